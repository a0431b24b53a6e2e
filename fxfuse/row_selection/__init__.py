"""Rows that are picked by a permutation, as ops whose derivatives pick rows too.

An expert layer sorts the (token, expert) pairs, takes the rows of the tokens in that order, and in the end sums the rows of each
token. To autograd these are reads at any indices, whose transposes add up what may meet: indices are sorted again, checked and
counted, some twenty launches each. That the indices come from a sort of these very pairs is in the graph: each row is then read a known
number of times, and the transpose of a read is the other read.

    op.py     spread: y[s] = x[source[s]]        collect: x[t] = sum_j y[place[t k + j]]        transposes of each other
    match.py  indices in a graph that come from a permutation
    weights.py  what an expert's rows are weighed by goes before its last product, where the rows are narrow
"""

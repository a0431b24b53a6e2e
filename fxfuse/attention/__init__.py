"""The rule ``attention``: products of queries and keys, a row program over them, and a product with the values, as one op.

Attention that no library kernel has (a soft cap on the scores, biases, masks of any kind) is written out by models, and its scores are
kept: heads x queries x keys. Here the kernels are the library's matrix products and one derived row kernel, taken in turn over chunks
of queries: the scores of a chunk stay in the cache, keys that a mask hides from the whole chunk enter no product, and the backward
makes the scores again from one number a row.

    match.py       which nodes of a canonical graph are an attention
    hiding.py      which operand of the row program is a mask, proven; which keys it hides from a chunk of queries
    known_masks.py what was read off a mask, once for each mask
    programs.py    the row programs of a chunk: weights, and the gradient of the scores with the weights again
    prepared.py    what follows from the row program alone, found once
    execution.py   the loop over chunks, forward and backward
    op.py          fxfuse::attention
    softmax.py     is a row program a softmax of single scores: then FlexAttention can do it as well
    blocks.py      a mask as FlexAttention takes it
    flex.py        FlexAttention's kernels
    ways.py        both ways in the same terms, each direction for itself
    choice.py      which is faster on a layout, measured
    layouts.py     which one a layout takes, from step to step
    beside.py      the process in which FlexAttention is compiled meanwhile
    flex_op.py     fxfuse::flex_attention, which goes either way
    sinks.py       one more score for every query, without a value
    checking.py    against float64
    fuse.py        found, checked, replaced, recorded
    causal.py      library attention with a mask that is proven to be plain causal keeps its fast kernel
"""

"""A linear and the row program that turns its output into a loss, as one op that never holds the logits.

    prepare.py    small rewrites, so that the loss stands apart from what else looks at the logits
    match.py      finds linears that end in a loss (join.py, between.py); tail.py: what becomes of the losses of the rows
    surgery.py    puts the op in their place, in the cheapest mode
    lazy_output.py, again.py    what remains of the logits as an output
    checking.py   compares a site with float64 first (site.py)          fuse.py    all of that, for one graph
    op.py         ``fxfuse::linear_loss`` and its derivative
    adjoint.py    the row programs of a chunk, derived                  products.py    the matrix products and their transposes
    execution.py  the loop over chunks of rows (chunks.py)
"""

"""A linear and the row program that turns its output into a loss, as one op that never holds the logits.

    match.py         finds them in a canonical graph                    op.py      ``fxfuse::linear_loss`` and its derivative
    lazy_output.py   what remains of the logits as a graph output       chunks.py  rows in chunks, by a byte budget
"""

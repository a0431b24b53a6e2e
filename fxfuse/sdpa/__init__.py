"""Attention that a model asks of ``scaled_dot_product_attention``: which library computes it, by measurement.

torch takes one of the kernels that it was built with. Where flash-attn-4 is installed too and is clearly faster on a layout of
operands, the layout takes that, from one training step to the next. No attention kernel here is ours.

    sites.py    the last pass over a graph: calls of SDPA remember their layout
    layouts.py  which library a layout takes, from step to step
    trial.py    both on one layout: times, and errors against float32
    families.py torch's kernels: their operators, forward and backward
    library.py  flash-attn-4
"""

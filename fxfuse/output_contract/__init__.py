"""The output contract: what becomes of an output that a fused graph no longer computes (the logits of a fused loss).

    stamp.py     whether the tensors that it is computed from are still what they were
    source.py    how its value can still be had: a slice of the original graph and the values it was given
    tensor.py    what stands in the model's output: a tensor that is computed when something reads it
    queries.py   what can be asked of a tensor without reading it
    fill.py      the compiled graph, with those outputs filled in
"""

"""What a training graph keeps for its backward: recomputation of cheap outputs, tags for AOTAutograd's partitioner.

``recompute`` rewrites the joint graph so that the backward computes cheap outputs of fused ops again; ``tags`` tells the
partitioner to save the rest as eager would; ``merge`` joins a recomputed forward with its adjoint into one pass.
"""

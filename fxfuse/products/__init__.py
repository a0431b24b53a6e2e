"""The algebra of matmuls: sums of products, in a form that reads and writes as little as it can.

A low-rank adapter is a sum ``x W' + s (x A') B'``; a gradient of an input that several linears read is a sum ``dY1 W1 + dY2 W2 + ...``.
Nothing here knows adapters, layers or models: these are sums of products, of which some are *thin* (one of their three sizes is small).

    before AOTAutograd, on the canonical graph (``rewrite_products``)
        casts.py        a widening cast that the matmul takes back is left out
        thin_sums.py    ``wide + s * (h B')`` becomes one addmm with the factor s in it; autograd derives the rest
    on the joint graph
        splitting.py    float32 thin matrices against widened 16-bit data: 16-bit matmuls with float32 results
    on the forward and the backward graph, after the partition (``arrange_products``)
        scalars.py      factors ride in a matmul
        stacking.py     thin products that read one large operand are one product
        augmented.py    a wide product and thin ones are one matmul, where there is room beside their factors
        accumulation.py sums of products are written into one buffer (beta=1), thin terms first
        pairs.py        two thin products of one large matrix are one call

What is found is checked by value before it is used (check.py).
"""

"""The bytes that a training step has to move beside its matrix products and attention, if whatever can be one pass is one pass.

Counted is what stays when everything is fused with what it stands beside: each operand of a norm, a rotary embedding or a gate is read
once and each result written once, an adapter reads its input once, its output's gradient once and its input again for the
gradient of A. Sums, casts, low-rank terms that are added and what a cache can hold count nothing; so no set of kernels that leaves
products and attention to libraries moves less.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.workloads import ALL_LINEARS, Workload

ITEM = 2  # bytes of a bfloat16 number
OPTIMIZER = 7  # numbers of AdamW for a weight: it, its gradient and both moments are read, all but the gradient written
NF4 = 0.5 + 1 / 64  # bytes of a 4-bit weight, with one byte for the scale of 64


@dataclass(frozen=True)
class Traffic:
    """Bytes: of one layer's forward (its own, and again where it is checkpointed) and backward; of head and optimizer."""

    forward: int
    backward: int
    once: int


def traffic(w: Workload) -> Traffic:
    """Of a step of a workload. Of layers with experts the gate's rows are those that were chosen; sorting them is not counted."""
    c = w.config
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    head = c.get("head_dim", hidden // heads)
    q, kv = heads * head, c["num_key_value_heads"] * head
    inner = (
        c["num_experts_per_tok"] * c["moe_intermediate_size"]
        if "num_experts" in c
        else c["intermediate_size"]
    )
    linears = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden),
               "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}  # fmt: skip
    weights = sum(rows * columns for rows, columns in linears.values())
    # two norms (x, y), rotated q and k (in, out), the gate (gate, up, product)
    forward = 2 * 2 * hidden + 2 * (q + kv) + 3 * inner
    # norms: x, dy, the gradient that passes by, dx; the gate: gate, up and d product in, d gate and d up out
    backward = 2 * 4 * hidden + 2 * (q + kv) + 5 * inner
    adapted = {name: linears[name] for name in ALL_LINEARS if name in w.targets}
    inputs = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # who reads the same
    read = sum(linears[name][0] for name in {inputs.get(name, name) for name in adapted})
    forward += read
    backward += read + sum(columns for _, columns in adapted.values())
    four_bit = round(weights * (ITEM + NF4)) if w.mode == "qlora" else 0
    once = 2 * ITEM * w.tokens * c["vocab_size"]  # logits, which become their gradient in place
    if w.mode == "full":
        tied = 1 if c.get("tie_word_embeddings") else 2
        once += ITEM * OPTIMIZER * (weights * c["num_hidden_layers"] + tied * hidden * c["vocab_size"])
    return Traffic(ITEM * w.tokens * forward + four_bit, ITEM * w.tokens * backward + four_bit, once)

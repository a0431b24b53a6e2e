"""What the fused sites of a model contain, read in their printed row programs: the other half of the coverage count.

The census sees that an operator of eager is gone; here is whether a fused site that ran contains it. A softmax is gone
into `softmax` or into `attention`, a loss into `cross_entropy` or `linear_loss`, an activation into whatever reads its
function. What is gone and in no program is not counted as fused (`unaccounted`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

Ledger = dict[str, dict[Any, int]]  # by module path: how often each of its graphs has run

_LINE = re.compile(r"(%\d+) = (\w+)(.*)")
_OPERAND = re.compile(r"%\d+")
_ACTIVATIONS = {"sigmoid", "tanh", "erf", "softplus", "expm1", "relu"}


def contents(rule: str, program: str) -> Counter[str]:
    """Norms, activations, softmaxes, losses (labels picked out of a row) and rotations in one row program."""
    nodes = {m[1]: (m[2], _OPERAND.findall(m[3])) for line in program.splitlines() if (m := _LINE.match(line.strip()))}
    found: Counter[str] = Counter()
    readers: defaultdict[str, set[str]] = defaultdict(set)
    for function, operands in nodes.values():
        for operand in operands:
            readers[operand].add(function)
    for name, (function, _) in nodes.items():
        found["norm"] += function == "rsqrt"
        found["activation"] += function in _ACTIVATIONS
        found["loss"] += function == "check_index"
        found["softmax"] += function == "exp" and {"sum", "div"} <= readers[name]
    found["rotary"] += "rope" in rule
    return +found


def ledger(model: Any) -> Ledger:
    """How often each compiled graph has run under each module."""
    from fxfuse.reporting.records import attached

    return {path: attached(module) for path, module in model.named_modules()}


def contained(before: Ledger, after: Ledger) -> dict[str, int]:
    """Sites by kind inside the fused sites that ran between two looks at a model's ledger."""
    found: Counter[str] = Counter()
    for path, records in after.items():
        for record, calls in records.items():
            ran = calls - before.get(path, {}).get(record, 0)
            for site in record.sites if ran > 0 else ():
                if site.status == "fused":
                    for kind, n in contents(site.rule, site.program).items():
                        found[kind] += n * site.count * ran
    return dict(sorted(found.items()))


def unaccounted(seen: dict[str, int], left: dict[str, int], inside: dict[str, int]) -> dict[str, int]:
    """Sites that the census no longer sees, and that no fused site which ran contains."""
    missing = {kind: n - left.get(kind, 0) - inside.get(kind, 0) for kind, n in seen.items()}
    return {kind: n for kind, n in missing.items() if n > 0}

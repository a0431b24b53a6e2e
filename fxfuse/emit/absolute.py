"""Which values may be off by a part in a million of 1, however small they are: exponents, and what a constant is added to.

exp(x + d) is exp(x) (1 + d): whoever reads a value through an exp alone reads its absolute error, as does who adds 1 to its square.
Constant factors on the way make the error larger. It is nothing beside that of operands of 16 bits, from which the value must come.
"""

from __future__ import annotations

from collections.abc import Collection

from ..program import Program

SHORT = ("float16", "bfloat16")
# The product of the factors on the way: the error of what becomes an exponent then is below 1e-4, a rounding of 16 bits 5e-4 and more.
MOST = 128.0


def is_read_absolutely(program: Program, value: int, live: Collection[int]) -> bool:
    """Whether nothing else is made of a value of a float32 program than exponents and sums with constants, and of what has 16 bits."""
    return program.math == "float32" and _comes_from_16_bits(program, value) and _only_exponents(program, value, live, 1.0)


def _comes_from_16_bits(program: Program, value: int) -> bool:
    node = program.nodes[value]
    if node.op == "load":
        return program.argument(node.attributes[0]).dtype in SHORT
    return all(program.nodes[v].op == "const" or _comes_from_16_bits(program, v) for v in node.operands)


def _only_exponents(program: Program, value: int, live: Collection[int], factor: float) -> bool:
    node = program.nodes[value]
    stored = any(v == value for output in program.outputs for v, _ in output.stores)
    if factor > MOST or (stored and node.op not in ("max", "stop")):
        return False  # a maximum is stored to be taken off again before an exp
    return all(_is_exponent(program, value, user, live, factor) for user in program.users[value] if user in live)


def _is_exponent(program: Program, value: int, user: int, live: Collection[int], factor: float) -> bool:
    node = program.nodes[user]
    number = next((abs(program.nodes[v].attributes[0]) for v in node.operands if program.nodes[v].op == "const"), None)
    if node.op == "exp":
        return _ends_in_16_bits(program, user)
    if node.op in ("add", "sub", "max", "stop"):
        return _only_exponents(program, user, live, factor)
    if node.op == "mul" and number is not None:
        return _only_exponents(program, user, live, factor * max(number, 1.0))
    if node.op == "square":
        sums = [program.nodes[u] for u in program.users[user] if u in live]
        return all(n.op in ("add", "sub") and any(_is_large(program, v) for v in n.operands) for n in sums)
    return False


def _ends_in_16_bits(program: Program, value: int) -> bool:
    """Whether what is stored in more bits is made of other values, but for the sum of a row, by which exponentials are divided."""
    made = {value}
    for later in range(value + 1, len(program.nodes)):  # operands come before what is made of them
        if made & set(program.nodes[later].operands):
            made.add(later)
    wide = [v for output in program.outputs if output.dtype not in SHORT for v, _ in output.stores]
    return all(program.nodes[v].op == "sum" or v not in made for v in wide)


def _is_large(program: Program, value: int) -> bool:
    node = program.nodes[value]
    return node.op == "const" and abs(node.attributes[0]) >= 0.5

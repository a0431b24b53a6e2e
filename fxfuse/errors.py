"""What can go wrong, by name. A message names the site, the reason and the remedy, in that order.

A site that cannot be fused is not an error: it is a declined site in the report, with a sentence. These are
raised when the caller asked for something that cannot be done, or when the compiler itself is at fault.
"""

from __future__ import annotations


class FxfuseError(Exception):
    """Everything fxfuse raises about its own work."""


class UnsupportedGraph(FxfuseError):
    """A graph or function holds something no stage can read: an op, a dtype, a device, a mutation."""


class DerivationError(FxfuseError):
    """A row program has no derivative that the three rules and the transposes can give."""


class EmissionError(FxfuseError):
    """A row program could not be written as a kernel, or the kernel did not compile."""


class ValidationError(FxfuseError):
    """A fused op disagrees with float64 more than eager does."""


class DoubleBackwardError(FxfuseError):
    """A second derivative was asked of a captured block, which only has the first."""


class OutputContractError(FxfuseError):
    """A rewritten graph gives outputs of another number, shape, dtype or stride than the original."""


class NotFused(FxfuseError, AssertionError):
    """``Report.assert_fused`` did not find what was asserted; the message says what was found instead."""

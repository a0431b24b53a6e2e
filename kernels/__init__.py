"""Schedules: hand-made kernel skeletons that a row program is poured into.

Installed as ``fxfuse.kernels``. This file must stay a docstring: run from the repository root, this folder
is importable as ``kernels``, a name that transformers probes for another project's package.
"""

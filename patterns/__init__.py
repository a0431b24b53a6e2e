"""Rules: one file per idea, each a plain PyTorch function that is matched, derived, tested against and read.

Installed as ``fxfuse.patterns``. This file must stay a docstring: run from the repository root, this folder
is importable as ``patterns``.
"""

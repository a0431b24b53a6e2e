"""Regions: connected sets of pointwise operations, row reductions and column lanes in a canonical graph, as row programs.

``find_regions(gm)`` reads a graph that ``canonicalize`` left; it changes nothing. Each region carries its row program, how the
program's arguments are viewed from graph nodes, and how its outputs are viewed back.
"""

from .find import find_regions
from .region import ArgumentView, Declined, OutputView, Region

__all__ = ["ArgumentView", "Declined", "OutputView", "Region", "find_regions"]

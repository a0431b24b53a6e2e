"""What AOTAutograd traced in an earlier run of this very build: the joint graph and its metadata, kept on disk.

A first step spends more time in AOTAutograd's two passes (the one that looks for aliases and mutations, the one that traces forward
and backward) than in anything else of the compiler that is ours to skip. Both are functions of what is asked (asked.py: the graph, its
inputs, the sizes' ranges) and of settings (conditions.py); their results are written and read by graphs.py, kept in files by
files.py, and put where torch would compute them by seam.py. What comes after (the memory plan, the partition, products, buffers) runs
as ever. ``FXFUSE_REMEMBER=0`` traces everything anew.

torch's own AOTAutogradCache is not used: it keeps the compiled forward and backward themselves (``BundledCompiledForward`` takes an
``OutputCode``, which writes itself down) and skips the partition and the compilers; ours are closures over a record, a plan and what
was measured in this process. And it holds operators of any library for known by their names (autograd_cache.py,
``is_cacheable_function``), whereas rules of ours stand behind fxfuse's: here their sources are part of the question.

A file is taken where nobody but this user, or root, could have written it (files.py), and names nothing that could run (graphs.py).
"""

from .asked import Unknown
from .seam import remembered

__all__ = ["Unknown", "remembered"]

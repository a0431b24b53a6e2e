"""What AOTAutograd traced in an earlier run of this very build: the joint graph and its metadata, kept on disk.

A first step spends more time in AOTAutograd's two passes (the one that looks for aliases and mutations, the one that traces forward
and backward) than in anything else of the compiler that is ours to skip. Both are functions of what is asked (asked.py: the graph, its
inputs, the sizes' ranges) and of settings (conditions.py); their results are written and read by graphs.py, kept in files by
files.py, and put where torch would compute them by seam.py. What comes after (the memory plan, the partition, products, buffers) runs
as ever. ``FXFUSE_REMEMBER=0`` traces everything anew.

torch's own AOTAutogradCache is not used: it keeps what a compiler made of the partitioned graphs and skips the partition and the
compilers altogether, and ours are closures over records, plans and measurements of this process; it takes only graphs without ops of
other namespaces and Python functions it knows (autograd_cache.py, ``check_node_safe``), unless the ops are declared safe one by one.
"""

from .asked import Unknown
from .seam import remembered

__all__ = ["Unknown", "remembered"]

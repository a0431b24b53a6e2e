"""Tests in this folder run emitted kernels in Triton's interpreter, which is chosen when Triton is imported.

So they run in processes of their own, started by tests/gradient/test_kernels_interpreted.py; collected anywhere else they are left out.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

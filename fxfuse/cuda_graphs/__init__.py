"""CUDA graphs of captured blocks: where the host is what is waited for, a block's kernels are launched as one.

``optimize(model, cuda_graphs=True)`` records the forward and the backward of each block once it has run, and replays them from then
on. A replay writes to the addresses of its recording, so it is done only where nobody can tell (pool.py says when); every other
call launches kernel by kernel, as without this option, and the report says how many did and why.

    fitness.py    which graphs can be recorded at all
    gauge.py      "auto": whether that is worth while
    pool.py       the memory that recordings share, and the rule that makes sharing safe
    recording.py  one recorded call: what is copied in, what comes out
    places.py     what is known of one module's calls at one size
    recorder.py   which calls are recorded, which replayed
    checkpoints.py, checkpoint_recorder.py   blocks that a checkpoint runs again
    capture.py    torch's CUDA graphs
"""

from .checkpoint_recorder import CheckpointRecorder
from .checkpoints import Both, is_kept_apart
from .fitness import why_unfit
from .gauge import Gauge
from .recorder import Pair, recorded, release

__all__ = ["Both", "CheckpointRecorder", "Gauge", "Pair", "is_kept_apart", "recorded", "release", "why_unfit"]

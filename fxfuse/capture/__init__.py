"""Capture: which modules of a model are compiled, and how they are installed in place.

A model is captured in pieces that repeat: each *block* (a decoder layer) by itself, the *head* (output
projection and loss) by compiling the top-level forward with the *backbone* kept out of its trace, and each
norm that lies outside blocks as a leaf. One graph then serves all blocks of a kind, however many there are.

    find.py        which modules: blocks, backbones, leaves
    declines.py    which of them must be left alone, each with a sentence
    dispatcher.py  what stands in a module's compile slot: eager or captured, call by call
    stack.py       a forward that calls its blocks itself, captured around them
    cache.py       a key/value cache among the arguments, made equal for all blocks
    collected_outputs.py  what hooks inside of blocks collect (router logits, attention weights)
    tail_calls.py  whether what a block returns is read at all: in a checkpoint's recomputation it is not
    context.py     the module that is being run or compiled; the settings a compilation needs
    sharded_weights.py  4-bit weights that FSDP2 has gathered
    head_unit.py   an output projection that FSDP2 gathers by itself
    adapted_weights.py  adapters that read the weight they adapt
    adapter_forwards.py  adapters whose forward is traced in other words
    rooms.py       frozen weights that are moved to where they have room for their adapters
    kind.py        what is learnt about modules of one kind
    marks.py       what is left on modules beside their slots
    install.py     putting all of it in and taking it out again
    rehearse.py    one training step that leaves no trace
"""

from fxfuse.capture.context import current_module
from fxfuse.capture.install import Installation, find_installation, install, is_copy, uninstall

__all__ = ["Installation", "current_module", "find_installation", "install", "is_copy", "uninstall"]

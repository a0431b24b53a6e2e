"""What a trainer left in a folder: its files, and the weights in them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

# They name the folder, or hold times and losses.
OF_THE_RUN = ("training_args.bin", "trainer_state.json", "README.md")


def files(folder: Path) -> set[str]:
    """Paths below ``folder``."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, Tensor]:
    """Of all safetensors files of a folder, by name."""
    from safetensors.torch import load_file

    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Bit for bit, under the same names."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def different(ours: Path, theirs: Path, but: tuple[str, ...] = OF_THE_RUN) -> list[str]:
    """Files that only one of two folders has, and files whose bytes differ, but for those named ``but``."""
    common = files(ours) & files(theirs)
    differ = {name for name in common if Path(name).name not in but and (ours / name).read_bytes() != (theirs / name).read_bytes()}
    return sorted((files(ours) ^ files(theirs)) | differ)

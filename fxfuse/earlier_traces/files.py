"""A trace in a file of its own, found by a digest of what was asked and good only for exactly that text.

The file holds what was asked in full and a digest of all of itself: one that is cut off, changed or moved from another question is as
good as none; so is one that somebody else wrote or could write. Of many files the ones that were used longest ago go.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from pathlib import Path

from ..kernels import library

logger = logging.getLogger("fxfuse")

_MAGIC = b"fxfuse trace 1\n"
_DIGEST = 32  # bytes of a SHA-256
_LENGTH = 8
MOST_BYTES = 256 << 20
MOST_FILES = 1024


def load(asked: str) -> bytes | None:
    """The trace kept for exactly this text, or None."""
    path = _path(asked)
    try:
        with path.open("rb") as file:
            if not _is_ours(os.fstat(file.fileno())):
                logger.debug("%s is another user's, or others may write it", path)
                return None
            content = file.read()
    except OSError:
        return None
    head, body = content[: len(_MAGIC) + _DIGEST], content[len(_MAGIC) + _DIGEST:]
    if head != _MAGIC + hashlib.sha256(body).digest():
        logger.debug("%s is not a whole file of a trace", path)
        return None
    end = _LENGTH + int.from_bytes(body[:_LENGTH], "little")
    if body[_LENGTH:end] != asked.encode():
        logger.debug("%s belongs to another graph", path)
        return None
    try:
        os.utime(path)
    except OSError:  # (a folder that can only be read)
        logger.debug("%s cannot be marked as used", path)
    return body[end:]


def _is_ours(facts: os.stat_result) -> bool:
    """May a file be read that could run anything: only this user, or root, has written it."""
    return facts.st_uid in (os.geteuid(), 0) and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def keep(asked: str, trace: bytes) -> None:
    """Writes the trace; a full disk, or a folder that cannot be written, keeps nothing."""
    question = asked.encode()
    body = len(question).to_bytes(_LENGTH, "little") + question + trace
    path = _path(asked)
    if library.keep(path, _MAGIC + hashlib.sha256(body).digest() + body):
        try:
            _drop_oldest(path.parent)
        except OSError as error:
            logger.debug("an old trace was not removed: %s", error)


def _path(asked: str) -> Path:
    return library.cache_dir() / "traces" / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.trace"


def _drop_oldest(folder: Path) -> None:
    """Keep to MOST_FILES and MOST_BYTES. Another process may remove the same file at the same time."""
    kept = []
    for path in folder.iterdir():
        try:
            facts = path.stat()
        except FileNotFoundError:
            continue
        kept.append((facts.st_mtime, facts.st_size, path))
    kept.sort(reverse=True)
    total = 0
    for number, (_, size, path) in enumerate(kept):
        total += size
        if number >= MOST_FILES or total > MOST_BYTES:
            path.unlink(missing_ok=True)

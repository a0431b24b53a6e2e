"""Generated source files: written once to the cache folder, named by content, imported from there.

The folder is ``FXFUSE_CACHE_DIR``, else ``~/.cache/fxfuse``, else one in the system's temporary folder. Deleting it costs a rewrite.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType

log = logging.getLogger("fxfuse")


def cache_dir() -> Path:
    """The folder, made if need be; a fallback that is used says so in the log."""
    return _made(os.environ.get("FXFUSE_CACHE_DIR") or str(Path.home() / ".cache" / "fxfuse"))


@lru_cache(maxsize=8)
def _made(wanted: str) -> Path:
    path = Path(wanted)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        fallback = Path(tempfile.gettempdir()) / f"fxfuse-{os.getuid()}"
        fallback.mkdir(mode=0o700, exist_ok=True)
        if fallback.is_symlink() or fallback.stat().st_uid != os.getuid():  # somebody else's, who could have us run what lies there
            fallback = Path(tempfile.mkdtemp(prefix=f"{fallback.name}-"))
        log.warning("cache folder %s cannot be written (%s); using %s", path, error, fallback)
        return fallback


def write_atomically(path: Path, content: str | bytes) -> None:
    """Another process may read or write the same file at the same time: it sees the whole content or none."""
    part = tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=path.name, suffix=".part", delete=False)
    try:
        with part:
            part.write(content.encode() if isinstance(content, str) else content)
        os.replace(part.name, path)
    except OSError:  # (a full disk is not to be filled further)
        Path(part.name).unlink(missing_ok=True)
        raise


def keep(path: Path, content: str | bytes) -> bool:
    """Writes what can be found out again, and whether it did: a full disk, or a folder that cannot be written, keeps nothing."""
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        log.debug("%s was not kept: %s", path, error)
        return False
    return True


@cache
def load(source: str) -> ModuleType:
    """The module of a generated source text."""
    name = "rows_" + hashlib.sha256(source.encode()).hexdigest()[:20]
    path = cache_dir() / f"{name}.py"
    if not path.exists() or path.read_text() != source:
        write_atomically(path, source)
    spec = importlib.util.spec_from_file_location(f"fxfuse_generated_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

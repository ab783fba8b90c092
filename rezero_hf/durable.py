"""Files that are either whole on disk or not there: synced, then renamed."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Push a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: whoever reads it, or finds it after a power cut, sees the old text or the new.

    Its folder is made if missing. Several processes may do it at once; one of them is the last.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)

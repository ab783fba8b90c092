"""Files that are either whole on disk or not there: synced, then renamed. Folders that one process writes for all."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TypeVar

from filelock import FileLock, Timeout


T = TypeVar("T")
# What a file browser knows of a folder, what belongs to a file on another system, what a network still holds open.
_LEFT_BY_SYSTEMS = re.compile(r"\.DS_Store|\._.*|\.nfs[0-9a-f]+|Thumbs\.db|desktop\.ini")


def sync(path: Path) -> None:
    """Push a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_in(folder: Path) -> list[str]:
    """The paths inside a folder of all files below it, in order, but for what operating systems leave there unasked."""
    found = (path for path in folder.rglob("*") if not path.is_dir() and _LEFT_BY_SYSTEMS.fullmatch(path.name) is None)
    return sorted(path.relative_to(folder).as_posix() for path in found)


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


def written_once(folder: Path, mark: str, write: Callable[[], T], progress: bool) -> T | None:
    """Have a folder written by this process, unless it is there, or another one is at it: then wait for that.

    Whoever writes holds a file lock, which ends with its process.

    Args:
        folder: what `write` makes, by a rename when all of it is on disk.
        mark: the file in it by which it is known to be there.
        write: called with the lock held.
        progress: say, once and where progress bars are, that this has to wait.

    Returns:
        What `write` returned; None if it was not called.
    """
    lock, waited = FileLock(folder.with_name(f"{folder.name}.lock")), False
    # Looked at before the lock, so that a cache that can only be read will do.
    while not (folder / mark).is_file():
        try:
            held = lock.acquire(timeout=1)
        except Timeout:
            if not waited and progress:
                print(f"waiting for another process to prepare {folder}", file=sys.stderr, flush=True)
            waited = True
            continue
        with held:
            # A network file system may remember for half a minute that there was no such file, and looks again once the
            # folder around it has changed.
            NamedTemporaryFile(dir=folder.parent).close()
            if not (folder / mark).is_file():
                return write()
    return None

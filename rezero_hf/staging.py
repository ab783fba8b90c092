"""What a push uploads: made of an export or of a training checkpoint, completed and checked before anything leaves."""

import os
import shutil
from pathlib import Path

from .export import describe_folder, is_exported
from .verification import verify_folder, verify_text


def stage(source: Path, into: Path, checkpoint: Path | None = None) -> Path:
    """Take over what a push needs from a folder that may be deleted soon, as hard links where the disk can.

    Args:
        source: an export, or a finished training checkpoint, of which only what an export holds is taken.
        into: where; what is there is deleted.
        checkpoint: a training checkpoint that is put whole beside it, to go on from elsewhere.

    Returns:
        `into`, to be completed by `complete`.
    """
    shutil.rmtree(into, ignore_errors=True)
    for path in _files(source):
        name = path.relative_to(source)
        if is_exported(name.as_posix()):
            _link(path, into / "root" / name)
    for path in _files(checkpoint) if checkpoint is not None else ():
        _link(path, into / "beside" / checkpoint.name / path.relative_to(checkpoint))
    return into


def complete(staged: Path, repo_id: str | None = None) -> Path:
    """Render the card and the figures of a staged checkpoint, verify everything; returns the folder to upload.

    Args:
        staged: from `stage`.
        repo_id: `ORG/NAME`, for the card's usage snippets.

    Raises:
        CheckpointError: it would not load, or holds what must not be published; every problem is listed.
    """
    root = staged / "root"
    describe_folder(root, repo_id=repo_id)
    verify_folder(root)
    for checkpoint in (staged / "beside").glob("*"):
        verify_text(checkpoint)
        checkpoint.rename(root / checkpoint.name)
    return root


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

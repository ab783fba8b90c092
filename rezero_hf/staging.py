"""What a push uploads: made of an export or of a training checkpoint, described and checked before anything leaves."""

import os
import shutil
from pathlib import Path

from .errors import UserError
from .export import describe_folder, is_exported, write_records
from .runs import read_record
from .verification import verify_folder, verify_text


def stage(source: Path, into: Path, checkpoint: Path | None = None) -> Path:
    """Take over what a push needs from a folder that may be deleted soon.

    Weights, and all of a checkpoint, are hard links where the disk can, and are only read. What is small is copied,
    because card and figures are about to be made anew, and `source` vouches for its own.

    Args:
        source: an export, or a finished training checkpoint, of which only what an export holds is taken.
        into: where; what is there is deleted.
        checkpoint: a training checkpoint that is put whole beside it, to go on from elsewhere.

    Returns:
        `into`, for `make_publishable`.
    """
    shutil.rmtree(into, ignore_errors=True)
    for path in _files(source):
        name = path.relative_to(source)
        if is_exported(name.as_posix()):
            take = _link if path.suffix == ".safetensors" else shutil.copyfile
            _make(into / "root" / name, path, take)
    for path in _files(checkpoint) if checkpoint is not None else ():
        _make(into / "beside" / checkpoint.name / path.relative_to(checkpoint), path, _link)
    return into


def left_out(source: Path) -> list[str]:
    """Files of a folder that a push of it does not take."""
    return [name for path in _files(source) if not is_exported(name := path.relative_to(source).as_posix())]


def make_publishable(staged: Path, repo_id: str | None = None) -> Path:
    """Render the card and the figures of a staged folder, and verify everything; returns the folder to upload.

    Args:
        staged: from `stage`.
        repo_id: `ORG/NAME`, which its record then says, for the card's usage snippets.

    Raises:
        UserError: it is no model, would not load, or holds what must not be published; every problem is listed.
    """
    root = staged / "root"
    if not (root / "config.json").is_file():
        raise UserError("there is no model to push: the folder has no config.json")
    write_records(root, read_record(root / "run.json") | {"repo_id": repo_id}, None)
    describe_folder(root)
    verify_folder(root)
    for checkpoint in (staged / "beside").glob("*"):
        verify_text(checkpoint)
        checkpoint.rename(root / checkpoint.name)
    return root


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _make(target: Path, source: Path, take) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    take(source, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

"""What a push uploads: made of an export or of a training checkpoint, described and checked before anything leaves."""

import os
import shutil
from pathlib import Path

from .durable import files_in
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
    for name in files_in(source):
        if is_exported(name):
            _make(into / "root" / name, source / name, _link if name.endswith(".safetensors") else shutil.copyfile)
    for name in files_in(checkpoint) if checkpoint is not None else ():
        _make(into / "beside" / checkpoint.name / name, checkpoint / name, _link)
    return into


def left_out(source: Path) -> list[str]:
    """Files of a folder that a push of it does not take."""
    return [name for name in files_in(source) if not is_exported(name)]


def make_publishable(staged: Path, repo_id: str | None = None, license: str | None = None) -> Path:
    """Render the card and the figures of a staged folder, and verify everything; returns the folder to upload.

    Args:
        staged: from `stage`.
        repo_id: `ORG/NAME`, which its record then says, for the card's usage snippets.
        license: which its record then says. Default: what it says already, as in `export_folder`.

    Raises:
        UserError: it is no model, would not load, or holds what must not be published; every problem is listed.
    """
    root = staged / "root"
    if not (root / "config.json").is_file():
        raise UserError("there is no model to push: the folder has no config.json")
    said = {"license": license} if license else {}
    write_records(root, read_record(root / "run.json") | {"repo_id": repo_id} | said, None)
    describe_folder(root)
    verify_folder(root)
    for checkpoint in (staged / "beside").glob("*"):
        verify_text(checkpoint)
        checkpoint.rename(root / checkpoint.name)
    return root


def _make(target: Path, source: Path, take) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    take(source, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

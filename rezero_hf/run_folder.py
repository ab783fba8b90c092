"""Whose folder it is: a run goes on in its own, starts in an empty one, and takes nobody else's."""

import itertools
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from .checkpoints import checkpoints_in
from .durable import write_whole
from .errors import UserError
from .recipe import changed_words
from .sources import writable_folder


# What a run that goes on elsewhere may have another of.
LENGTH = ("training.max_steps:", "training.num_train_epochs:")


class RunDir(NamedTuple):
    """A folder claimed for one run.

    Attributes:
        path: the folder; empty, or that of the run to go on with.
        aside: where an earlier run is now (`NAME.1`, `NAME.2`, ...); None when there was none.
        goes_on: the folder holds this run, interrupted, with checkpoints.
        lock: held as long as this object lives, so that no second run writes into the same folder.
    """

    path: Path
    aside: Path | None
    goes_on: bool
    lock: FileLock


def claim_run_dir(path: str | Path, recipe: str, restart: bool = False) -> RunDir:
    """Claim a run's folder: that of the same run, interrupted, or an empty one.

    A finished run, and one that was interrupted before its first checkpoint, is moved aside. Anything that is no run
    is left alone.

    Args:
        path: where the run goes.
        recipe: the resolved recipe; it is written to `recipe.yaml`.
        restart: move an interrupted run aside too.

    Raises:
        UserError: another run is writing there; an interrupted run there has another recipe; the folder holds
            something that is no run, or it cannot be made.
    """
    path, aside, goes_on = Path(path).absolute(), None, False
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        if path.exists() and any(path.iterdir()):
            if not (path / "recipe.yaml").is_file():
                raise UserError(f"{path} is not empty and holds no run; choose another folder with --output.")
            goes_on = not restart and is_interrupted(path)
            if goes_on:
                _check_same_run(path, recipe)
            else:
                numbers = itertools.count(1)
                aside = next(free for n in numbers if not (free := path.with_name(f"{path.name}.{n}")).exists())
                path.rename(aside)
        path.mkdir(exist_ok=True)
        write_whole(path / "recipe.yaml", recipe)
    except Timeout as error:
        raise UserError(f"{path}: another run is writing there; wait, or choose another with --output.") from error
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{path}: no run can be written there ({reason}); choose another with --output.") from error
    return RunDir(path, aside, goes_on, lock)


def new_folder(path: str | Path) -> None:
    """Make the folder of a run that does not go on, and takes nobody's place.

    Raises:
        UserError: something is there, or it cannot be made.
    """
    path = Path(path)
    writable_folder(path, "choose another folder with --output")
    check_empty(path)


def check_empty(path: str | Path) -> None:
    """Raise a `UserError` if something is in a folder, before `new_folder` is to make it."""
    path = Path(path)
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} is not empty; choose another folder with --output.")


def check_goes_on(checkpoint: Path, recipe: str) -> None:
    """Raise a `UserError` unless a checkpoint of another folder is of a recipe, but for the length of the run.

    The data are held by their fingerprint; where they lie may be another place. A checkpoint without a recipe, of a
    trainer of one's own, is taken.
    """
    known = checkpoint / "recipe.yaml"
    if not known.is_file():
        return
    changed = [
        line
        for line in changed_words(known.read_text(encoding="utf-8"), recipe)
        if line.startswith(("model.", "training.")) and not line.startswith(LENGTH)
    ]
    if changed:
        raise UserError(
            f"{checkpoint} is of another recipe ({'; '.join(changed[:4])}): put that back to go on with it, or begin "
            "with its weights by init_from.path."
        )


def is_interrupted(path: str | Path) -> bool:
    """Whether a folder holds an unfinished run with checkpoints."""
    return not (Path(path) / "run.json").is_file() and bool(checkpoints_in(Path(path) / "checkpoints"))


def _check_same_run(path: Path, recipe: str) -> None:
    changed = changed_words((path / "recipe.yaml").read_text(encoding="utf-8"), recipe)
    if changed:
        raise UserError(
            f"{path} holds an interrupted run of another recipe ({'; '.join(changed[:4])}): put that back to go on "
            "with it, give --restart to move it aside, or choose another folder with --output."
        )

"""Training checkpoints on disk: a folder with its final name is whole, and says what it holds.

A checkpoint is written as `.checkpoint-N.partial`. When every process has written its part, each file is synced and
its hash goes into `complete.json`, which is synced last; then the folder takes its name. A run that is killed on the
way leaves a partial folder that nobody reads and the next save removes.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock
from huggingface_hub import HfApi, snapshot_download

from .durable import files_in, sync, write_whole
from .errors import HUB_FAILURES, UserError, one_line


MANIFEST = "complete.json"
# Raise it when a checkpoint of the old kind could not be resumed from any more.
FORMAT_VERSION = 1
_NAME = re.compile(r"checkpoint-(\d+)")


class IncompleteCheckpointError(UserError):
    """A folder is no whole checkpoint; the message says which file is wrong and how."""


def partial_of(folder: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return folder.with_name(f".{folder.name}.partial")


def begin_checkpoint(folder: Path) -> Path:
    """Make the empty partial folder of a checkpoint, and clear away what killed saves have left beside it."""
    for stale in (*folder.parent.glob(".checkpoint-*.partial"), *folder.parent.glob(".checkpoint-*.deleted")):
        shutil.rmtree(stale)
    partial = partial_of(folder)
    partial.mkdir(parents=True)
    return partial


def finish_checkpoint(folder: Path, record: dict[str, Any]) -> None:
    """Vouch for everything in the partial folder and give it its name. An older folder of that name is replaced.

    Args:
        folder: the final name, `checkpoint-N`.
        record: what resuming needs to know beforehand (JSON); `verify_checkpoint` returns it.
    """
    partial = partial_of(folder)
    names = _names(partial)
    for name in names:
        sync(partial / name)
    for inner in {(partial / name).parent for name in names}:
        sync(inner)
    files = dict(zip(names, _fingerprints(partial, names), strict=True))
    write_whole(partial / MANIFEST, json.dumps({"format": FORMAT_VERSION, **record, "files": files}, indent=1) + "\n")
    if folder.exists():
        remove_checkpoint(folder)
    partial.rename(folder)
    sync(folder.parent)


def record_of(folder: str | Path) -> dict[str, Any]:
    """What `complete.json` says; its files are for `verify_checkpoint` to compare.

    Raises:
        IncompleteCheckpointError: there is none, it cannot be read, or it is of another format.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, _ = manifest["format"], manifest["files"]
    except OSError:
        raise IncompleteCheckpointError(f"{folder} has no {MANIFEST}: it was never finished") from None
    except (ValueError, KeyError, TypeError):
        raise IncompleteCheckpointError(f"{folder / MANIFEST} is damaged") from None
    if version != FORMAT_VERSION:
        raise IncompleteCheckpointError(
            f"{folder} has format {version}, this version reads {FORMAT_VERSION}: resume with the version that wrote it"
        )
    return manifest


def verify_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Compare every file with the size and hash it was written with.

    Reads everything once, hashed by xxh3-128 on all cores: it is to find damage, not forgery, and is several times
    faster than a disk.

    Args:
        folder: a checkpoint.

    Returns:
        What `complete.json` says.

    Raises:
        IncompleteCheckpointError: a file is missing, has changed, or was not vouched for.
    """
    folder = Path(folder)
    manifest = record_of(folder)
    expected = manifest["files"]
    found = set(_names(folder))
    for name in sorted(expected):
        if name not in found:
            raise IncompleteCheckpointError(f"{folder / name} is missing")
    if strange := sorted(found - set(expected)):
        raise IncompleteCheckpointError(f"{folder / strange[0]} does not belong to the checkpoint")
    for name, now in zip(sorted(expected), _fingerprints(folder, sorted(expected)), strict=True):
        if now["bytes"] != expected[name]["bytes"]:
            raise IncompleteCheckpointError(
                f"{folder / name} has {now['bytes']} bytes instead of {expected[name]['bytes']}"
            )
        if now != expected[name]:
            raise IncompleteCheckpointError(f"{folder / name} has changed since it was written")
    return manifest


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Every folder called `checkpoint-N` below `folder`, the newest first; whole or not."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: str | Path) -> int:
    """The step in a checkpoint's name."""
    return int(_NAME.fullmatch(Path(folder).name).group(1))


def newest_complete(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies and can be resumed from.

    Args:
        folder: where a run's checkpoints are; it need not exist.

    Returns:
        The checkpoint, None if there is none, and a line for each newer one that was passed over, saying why.
    """
    skipped = []
    for checkpoint in checkpoints_in(folder):
        try:
            if verify_checkpoint(checkpoint)["resumable"]:
                return checkpoint, skipped
            skipped.append(f"{checkpoint} holds weights alone (save_only_model)")
        except IncompleteCheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def fetch_checkpoint(source: str, into: Path, check: Callable[[Path], None] | None = None) -> Path:
    """Bring a checkpoint from elsewhere to where a run looks for its own.

    Every process of a run may call it: the first does the work, the others wait for its lock, which no collective times
    out on.

    Args:
        source: a checkpoint's folder; or `ORG/NAME` or `ORG/NAME@REVISION` of a Hub repository that holds folders
            `checkpoint-N`, of which the newest complete one is taken. Nothing of it is run; one in shards, which torch
            describes in a pickle, is refused.
        into: the run's folder of checkpoints, which holds none yet.
        check: raises where a checkpoint, whole as it is, does not fit; then nothing is brought.

    Returns:
        The checkpoint there.

    Raises:
        UserError: there is no complete checkpoint.
    """
    into.mkdir(parents=True, exist_ok=True)
    with FileLock(into.parent / ".fetch.lock"):
        return next(iter(checkpoints_in(into)), None) or _fetch(source, into, check)


def _fetch(source: str, into: Path, check: Callable[[Path], None] | None) -> Path:
    source = os.path.expanduser(source)
    local = Path(source).is_dir()
    if local:
        found, skipped = Path(source).absolute(), []
    else:
        try:
            found, skipped = _newest_on_hub(*source.partition("@")[::2])
        except HUB_FAILURES as error:
            raise UserError(
                f"{source} is neither a folder nor a Hub repository that can be read ({one_line(error)})"
            ) from error
        if found is not None and any(found.rglob(".metadata")):
            raise UserError(
                f"{source}: {found.name} is in shards, whose description torch reads as a pickle, and that runs code: "
                "export it where it was made, or download it yourself, if you trust it, and name the folder."
            )
    if found is None or _NAME.fullmatch(found.name) is None:
        there = "; ".join(skipped) or "a checkpoint's folder is called checkpoint-N"
        raise UserError(f"{source} holds no complete checkpoint ({there})")
    # The Hub's was verified when it was chosen.
    record = verify_checkpoint(found) if local else record_of(found)
    if check is not None:
        check(found)
    target = into / found.name
    partial = begin_checkpoint(target)
    for name in _names(found):
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(found / name, partial / name)
    finish_checkpoint(target, record)
    return target


def _newest_on_hub(repository: str, revision: str) -> tuple[Path | None, list[str]]:
    """`newest_complete` of a repository, of which no older checkpoint is downloaded."""
    try:
        head = HfApi().model_info(repository, revision=revision or None)
        names = {file.rfilename.partition("/")[0] for file in head.siblings or ()}
        commit, names = head.sha, sorted(filter(_NAME.fullmatch, names), key=step_of, reverse=True)
    except HUB_FAILURES:
        # Without a network an earlier download will do; what else is wrong the next request says too.
        commit, names = revision or None, ["checkpoint-*"]
    skipped: list[str] = []
    for name in names:
        snapshot = snapshot_download(repository, revision=commit, allow_patterns=f"{name}/**")
        found, skipped = newest_complete(snapshot)
        # One that is older was downloaded at another time, and there may be a newer one.
        if found is not None and fnmatch(found.name, name):
            return found, skipped
    return None, skipped


def rotate(folder: Path, step: int, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest finished checkpoints beyond `limit`; never that of `step`, just written, nor `best`.

    A folder without `complete.json` and one of a later step, which the run has passed over as damaged, neither count
    nor are deleted: they are for a person to look at.
    """
    if not limit or limit < 1:
        return
    finished = [path for path in checkpoints_in(folder) if (path / MANIFEST).is_file() and step_of(path) <= step]
    kept = [path for path in finished if best is not None and path.name == Path(best).name]
    for checkpoint in finished:
        if checkpoint not in kept and (len(kept) < limit or checkpoint == finished[0]):
            kept.append(checkpoint)
    for checkpoint in finished:
        if checkpoint not in kept:
            remove_checkpoint(checkpoint)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint such that a kill on the way leaves no half of it under its name."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _names(folder: Path) -> list[str]:
    return [name for name in files_in(folder) if name != MANIFEST]


def _fingerprints(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_fingerprint, (folder / name for name in names)))


def _fingerprint(path: Path) -> dict[str, Any]:
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "xxh3_128": digest.hexdigest()}

"""Publish a model: an export, or a training checkpoint, to a Hub repository in one commit.

python scripts/publish.py runs/quickstart/model ORG/NAME            # says what it would upload
python scripts/publish.py runs/quickstart/model ORG/NAME --push
"""

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from rezero_hf.checkpoints import MANIFEST, verify_checkpoint
from rezero_hf.cli import run
from rezero_hf.errors import UserError
from rezero_hf.publishing import Repository, check_access, push_folder
from rezero_hf.staging import left_out, make_publishable, stage


def main(
    folder: Annotated[Path, typer.Argument(help="an export (runs/NAME/model) or a training checkpoint")],
    repository: Annotated[str, typer.Argument(help="ORG/NAME on the Hub, or ORG/NAME@BRANCH")],
    push: Annotated[bool, typer.Option("--push", help="upload; without it nothing leaves this machine")] = False,
    private: Annotated[bool | None, typer.Option(help="make a new repository private")] = None,
    message: Annotated[str, typer.Option(help="the commit's message")] = "Publish",
    license: Annotated[str | None, typer.Option(help="licence of code and weights, e.g. mit [as recorded]")] = None,
    patience: Annotated[float, typer.Option(min=0, help="minutes during which a busy Hub is tried again")] = 30.0,
):
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+(@[\w.-]+(/[\w.-]+)*)?", repository):
        raise UserError(f"{repository}: name a repository as ORG/NAME or ORG/NAME@BRANCH")
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    if (folder / MANIFEST).exists():
        verify_checkpoint(folder)
    name, _, branch = repository.partition("@")
    where = Repository(name, branch or None, private)
    # On the same disk files are linked instead of copied.
    beside = folder.absolute().parent
    with TemporaryDirectory(prefix=".publish-", dir=beside if os.access(beside, os.W_OK) else None) as staging:
        ready = make_publishable(stage(folder, Path(staging) / "staged"), name if "/" in name else None, license)
        files = sorted(path for path in ready.rglob("*") if path.is_file())
        for path in files:
            print(f"{path.stat().st_size:>15,}  {path.relative_to(ready)}")
        print(f"{sum(path.stat().st_size for path in files):>15,}  bytes in {len(files)} files, verified")
        if others := left_out(folder):
            print(f"left out, as no export writes them: {', '.join(others)}")
        if not push:
            print(f"nothing was uploaded; --push uploads this to {where}")
            return
        # Makes the repository, which a folder that is refused must not leave behind.
        if (problem := check_access(where)) is not None:
            print(f"{where}: {problem}")
        # Training checkpoints there are for somebody to go on from.
        words = {"keep": lambda step: True, "patience": 60 * patience, "tell": print}
        pushed = push_folder(ready, where, message, **words)
        print(f"{where}: commit {pushed.commit}, after {pushed.attempts} attempt(s) and {pushed.seconds:.1f} s")


if __name__ == "__main__":
    run(main)

"""How every script starts: typer reads the arguments, and a user's mistake ends in one line instead of a traceback.

And how it takes the files that arguments name.
"""

import functools
import gc
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import typer

from .errors import UserError, one_line
from .sources import writable_folder


# What torch says when a peer or a data loader has ended: gloo, NCCL, the store they meet at, and DataLoader.
SIGNS_OF_A_LOST_PROCESS = (
    *("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "Socket Timeout"),
    *("ncclRemoteError", "ncclSystemError", "ncclInternalError", "DataLoader worker", "Timed out waiting"),
)


def stop(message: str) -> NoReturn:
    """End this process with status 2 and one line on stderr, which says which process it is when there are several."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    where = f"[process {os.environ.get('RANK', '0')}] " if processes > 1 else ""
    typer.echo(f"{where}error: {message}", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if processes > 1:
        # Leaving by the door would wait for peers that wait for this one.
        os._exit(2)
    sys.exit(2)


def run(*mains: Callable) -> None:
    """Run a script's `main`, its arguments taken from the command line by their annotations.

    A `UserError` is printed as one line on stderr and ends the process with status 2. So does what a process sees when
    another one of its run, or one of its data loaders, is gone.

    Args:
        mains: one function; or several, which are the script's subcommands, by their names and docstrings.
    """
    # click joins the lines of a paragraph, unless a line of this mark alone stands above it: commands keep theirs.
    help = re.sub(r"\n\n(?=.*\bpython scripts/)", "\n\n\b\n", sys.modules[mains[0].__module__].__doc__ or "")
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help=help,
        # Transformers' and accelerate's own flags have underscores: either is right here.
        context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
    )
    for main in mains:
        app.command(help=help if len(mains) == 1 else main.__doc__)(_guarded(main))
    app()


def _guarded(main: Callable) -> Callable:
    @functools.wraps(main)
    def guarded(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            stop(str(error))
        except RuntimeError as error:
            if not any(sign in str(error) for sign in SIGNS_OF_A_LOST_PROCESS):
                raise
            stop(
                f"another process of this run is gone ({one_line(error, 120)}); what it said, if "
                "anything, is the reason. The same command goes on from the last complete checkpoint."
            )
        finally:
            leave_group()

    return guarded


def read_text(path: Path) -> str:
    """The text of a file that a user named.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({one_line(error)})") from error


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers with commas between them.

    Raises:
        UserError: it is something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: must be whole numbers with commas between them") from None


def result_file(path: Path, option: str) -> Path:
    """The file that a result goes to, `~` expanded, its folder tried out before the work.

    Args:
        path: what the user said.
        option: with which, for messages.

    Raises:
        UserError: it is a folder, or nothing can be written beside it.
    """
    path = path.expanduser()
    writable_folder(path.parent, f"name another file with {option}")
    if path.is_dir():
        raise UserError(f"{option} {path}: this is a folder; name a file")
    return path


def leave_group() -> None:
    """Leave the other processes in good order, while Python is alive.

    What still holds the group when the interpreter ends (a model wrapped by DDP, in a cycle of references) has threads
    that then look for Python and now and then abort the process after all its work is done.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()

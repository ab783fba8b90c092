"""What the processes of a run do together: one decides for all, and none goes on alone when another has failed.

Every function here is a collective: all processes call it, in the same order.
"""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .errors import UserError


T = TypeVar("T")


def on_main(act: Callable[[], T]) -> T:
    """Run `act` on the main process; every process gets its result (picklable), or its `UserError`.

    Raises:
        UserError: as raised by `act`, or made of the `OSError` it raised.
    """
    outcome = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = act()
        except (UserError, OSError) as error:
            outcome[1] = _one_line(error)
    if PartialState().num_processes > 1:
        outcome = broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def everywhere(act: Callable[[], None], way_out: str) -> None:
    """Run `act` on every process; if it fails on any, all raise, instead of waiting for the one that is gone.

    Args:
        act: what each process does.
        way_out: what the user can do, added to the message.

    Raises:
        UserError: says which process failed first, and why.
    """
    problem = None
    try:
        act()
    except (UserError, OSError, RuntimeError) as error:
        problem = _one_line(error)
    state = PartialState()
    problems = gather_object([problem]) if state.num_processes > 1 else [problem]
    for rank, found in enumerate(problems):
        if found is not None:
            where = f" (process {rank} of {state.num_processes})" if state.num_processes > 1 else ""
            raise UserError(f"{found}{where}: {way_out}")


def _one_line(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if "inline_container" in str(error):
        # All that torch says of a disk that is full is where in its own source it noticed.
        return "torch could not write a file, as on a full disk"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__

"""What the processes of a run do together: one decides for all, and none goes on alone when another has failed.

Every function here is a collective: all processes call it, in the same order.
"""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from .errors import UserError, one_line


T = TypeVar("T")
# What reading and writing raise when the disk, the network or the user is at fault, and not the program.
EXPECTED = (UserError, OSError, RuntimeError, SafetensorError, CheckpointException)


def on_main(act: Callable[[], T]) -> T:
    """Run `act` on the main process; every process gets its result (picklable), or its `UserError`.

    Raises:
        UserError: as raised by `act`, or made of what else can be expected there (`EXPECTED`). What cannot is raised as
            it is on the main process, and as a `UserError` on the others, so that none waits.
    """
    outcome, cause = [None, None], None
    if PartialState().is_main_process:
        try:
            outcome[0] = act()
        except Exception as error:
            outcome[1], cause = _one_line(error), error
    if PartialState().num_processes > 1:
        outcome = broadcast_object_list(outcome)
    if cause is not None and not isinstance(cause, EXPECTED):
        raise cause
    if outcome[1] is not None:
        raise UserError(outcome[1]) from cause
    return outcome[0]


def everywhere(act: Callable[[], None], way_out: str) -> None:
    """Run `act` on every process; if it fails on any, all raise, instead of waiting for the one that is gone.

    Args:
        act: what each process does.
        way_out: what the user can do, added to the message.

    Raises:
        UserError: says which process failed first, and why.
    """
    problem = cause = None
    try:
        act()
    except (Exception, CheckpointException) as error:
        problem, cause = _one_line(error), error
    state = PartialState()
    problems = gather_object([problem]) if state.num_processes > 1 else [problem]
    if cause is not None and not isinstance(cause, EXPECTED):
        raise cause
    for rank, found in enumerate(problems):
        if found is not None:
            where = f" (process {rank} of {state.num_processes})" if state.num_processes > 1 else ""
            raise UserError(f"{found}{where}: {way_out}") from cause


def _one_line(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if "inline_container" in str(error):
        # All that torch says of a disk that is full is where in its own source it noticed.
        return "torch could not write a file, as on a full disk"
    if isinstance(error, OSError) and error.strerror:
        # A copy that fails names its source first.
        name = error.filename2 or error.filename
        return f"{name}: {error.strerror}" if name else error.strerror
    return one_line(error, None) or type(error).__name__

"""New processes, alone or as a group, without the seconds in which a new interpreter imports what a model needs.

Python's own fork server has imported it once, and each process is a fork of that. Where it matters how an interpreter or
a launcher starts, tests start them: `test_launching`, `test_portable`, `test_import`.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import huggingface_hub.constants


forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["rezero_hf.training", "torch.distributed.fsdp", "torch.distributed.tensor.experimental"])


def run_script(script, *arguments, cwd=None, hub=None):
    """Run a script with `sys.argv` of itself and the arguments; gives its exit status and what it wrote.

    `hub` is a server that it takes for the Hub, and a folder for its caches.
    """
    environment, constants = {}, {}
    if hub is not None:
        server, home = hub
        environment, constants = server.environment(home), server.constants(home)
    with tempfile.TemporaryDirectory() as place:
        streams = [Path(place) / name for name in ("stdout", "stderr")]
        command = [str(script), *map(str, arguments)]
        (status,) = _finish([_start(command, streams, environment, cwd, constants)], timeout=300)
        return subprocess.CompletedProcess(command, status, *(stream.read_text() for stream in streams))


def run_in_group(processes, script, *arguments):
    """Run a script in so many processes at once, which can form a process group.

    Returns:
        The exit status of each, a signal's number below 0, and what they all wrote, in order of time.
    """
    command, output = [str(script), *map(str, arguments)], script.with_suffix(".out")
    size = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    size |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = map(str, range(processes))
    members = [_start(command, [output, output], {**size, "RANK": rank, "LOCAL_RANK": rank}) for rank in ranks]
    return _finish(members, timeout=240), output.read_text()


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _start(command, streams, environment=(), cwd=None, constants=None):
    # The server's environment is that of the moment when it was started.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)}
    process = forked.Process(target=_be, args=(command, streams, environment, cwd, constants or {}))
    process.start()
    return process


def _finish(processes, timeout):
    """The exit status of each; those that live longer than `timeout` seconds are killed."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _be(command, streams, environment, cwd, constants):
    os.environ.clear()
    os.environ.update(environment)
    # Made of the environment at its import, which the server has behind it.
    for name, value in constants.items():
        setattr(huggingface_hub.constants, name, value)
    os.chdir(cwd or ".")
    for number, stream in enumerate(streams, start=1):
        with stream.open("a") as file:
            os.dup2(file.fileno(), number)
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")

"""Pushing to the Hub while training goes on: each save from a process of its own, which training never waits for.

A save is taken over by links, so that the run may delete its checkpoint meanwhile. The process makes card and figures,
verifies the folder and pushes it; whatever goes wrong there, the run does not notice but by a line, and the next save
is tried like the first. `pushes.jsonl` beside the run says of every push which commit it became, or why none.
"""

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy

from .callbacks import append_row
from .checkpoints import checkpoints_in, step_of
from .errors import UserError
from .launching import end_with_parent, outside_the_launch
from .publishing import Repository, push_folder
from .staging import make_publishable, stage


JOURNAL = "pushes.jsonl"
# Seconds: one push during training is tried again for so long, since the Hub counts commits by the hour; the end of a
# run waits so long for its last push; and a run that was told to stop so long, before whoever told it loses patience.
PATIENCE, LAST_PATIENCE, STOP_PATIENCE = 3600.0, 900.0, 15.0
# Seconds more that a push has to say why it gave up.
LAST_WORDS = 10.0
# Strategies under which training checkpoints go with the model.
WITH_CHECKPOINTS = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
# One push: a request as JSON is its last argument.
COMMAND = (sys.executable, "-m", "rezero_hf.push_queue")


class PushQueue(TrainerCallback):
    """Pushes a run's saves to one repository, one at a time; of those that wait only the newest is kept.

    Stands on the main process alone. As a callback it looks after every step whether the next push can begin.

    Args:
        repository: where to.
        journal: the file that says what became of each push.
        staging: a folder beside the checkpoints, so that their files can be linked; its hidden folders `.push-*` are
            the queue's.
        strategy: `every_save` pushes the model, at the root of the repository; `checkpoint` also the newest checkpoint,
            `all_checkpoints` every one, as a folder `checkpoint-N` that a run can go on from on another machine
            (`--resume-from ORG/NAME`); `end` nothing before `put` is called.
    """

    def __init__(self, repository: Repository, journal: str | Path, staging: str | Path, strategy: str = "every_save"):
        self.repository = repository
        self.journal = Path(journal)
        self.staging = Path(staging)
        self.strategy = HubStrategy(strategy)
        self._process: subprocess.Popen | None = None
        self._running: dict[str, Any] = {}
        self._rows_before = 0
        self._waiting: dict[str, Any] | None = None
        self._unsent: list[Path] = []
        self._goes_on_from = 0
        self._newest: Path | None = None
        self._count = itertools.count()
        for left_by_a_kill in self.staging.glob(".push-*"):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)

    @property
    def pushes_checkpoints(self) -> bool:
        """Whether training checkpoints go with the model."""
        return self.strategy in WITH_CHECKPOINTS

    def on_step_end(self, args, state, control, **kwargs):
        self._advance()

    def rows(self) -> list[dict[str, Any]]:
        """The journal: where to and `step`, and `commit`, `attempts`, `seconds`, or `failed`."""
        try:
            lines = self.journal.read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:
                # Torn by a kill.
                continue
        return rows

    @property
    def arrived(self) -> bool:
        """Whether the last push that ended is on the Hub."""
        return "commit" in next(iter(self.rows()[-1:]), {})

    def saved(self, checkpoint: Path) -> None:
        """Have a finished checkpoint pushed, if the strategy is to."""
        self._newest = checkpoint
        if self.strategy != HubStrategy.END:
            self.put(checkpoint, step_of(checkpoint))

    def resumed(self, checkpoint: Path) -> None:
        """Have the checkpoint that a run goes on from pushed, unless the journal knows it to be on the Hub."""
        self._goes_on_from = step_of(checkpoint)
        there = [row["step"] for row in self.rows() if "commit" in row and row.get("to") == self._to()]
        if step_of(checkpoint) > max(there, default=0):
            self.saved(checkpoint)
        else:
            self._newest = checkpoint

    def put(self, source: Path, step: int, message: str | None = None) -> None:
        """Have an export or a checkpoint pushed as soon as the one before it is. Takes as long as linking its files.

        With the strategies that say so, the newest checkpoint goes with it.
        """
        folder = self.staging / f".push-{os.getpid()}-{next(self._count)}"
        try:
            stage(source, folder, self._newest if self.pushes_checkpoints else None)
        except OSError as error:
            self._note(step, f"{error.filename}: {error.strerror}")
            shutil.rmtree(folder, ignore_errors=True)
            return
        if self._waiting is not None:
            self._give_up(self._waiting)
        self._waiting = {"staged": str(folder), "step": step, "message": message or f"Step {step}"}
        self._advance()

    def finish(self, model: Path, step: int) -> str:
        """Push the finished model; returns the line that says what came of it, and what can be done.

        What is being pushed just now gets a minute to end; what waits is left out.
        """
        self.put(model, step)
        print(f"pushing {model} to {self.repository} ...", flush=True)
        line = self.close(LAST_PATIENCE, grace=60.0)
        if not self.arrived:
            line = f"{line}\npush it later: python scripts/publish.py {model} {self.repository} --push"
        return line

    def stop(self) -> str | None:
        """`close` for a run that was told to stop: the newest save gets a few seconds, and an older one none."""
        return self.close(STOP_PATIENCE, grace=0.0)

    def close(self, timeout: float, grace: float | None = None) -> str | None:
        """Wait for what is still to be pushed, and say what came of it.

        Args:
            timeout: seconds for the last push, after which it is given up.
            grace: seconds for the one before it, if it is still running; default `timeout`.

        Returns:
            A line for the user: the last commit, or what is missing on the Hub and why. None if nothing was pushed.
        """
        if self._process is not None and self._waiting is not None:
            self._wait_or_end(timeout if grace is None else grace)
        self._advance(timeout)
        if self._process is not None:
            self._wait_or_end(timeout + LAST_WORDS)
            self._advance()
        while self._unsent:
            shutil.rmtree(self._unsent.pop(), ignore_errors=True)
        rows = self.rows()[-1:]
        if not rows:
            return None
        step = rows[0]["step"]
        if "failed" in rows[0]:
            return f"step {step} is not on the Hub: {rows[0]['failed']}"
        return f"step {step} is on the Hub: {self.repository}, commit {rows[0]['commit']}"

    def _wait_or_end(self, seconds: float) -> None:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
            if not self._is_noted():
                self._note(self._running["step"], f"not done in {seconds:.0f} s")

    def _is_noted(self) -> bool:
        return len(self.rows()) > self._rows_before

    def _advance(self, patience: float = PATIENCE) -> None:
        """Take note of a push that has ended, and begin the one that waits."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            if not self._is_noted():
                self._note(self._running["step"], f"the process that pushes ended with {self._process.returncode}")
            if self._is_noted() and self.arrived:
                shutil.rmtree(self._running["staged"], ignore_errors=True)
            else:
                self._give_up(self._running)
            self._process = None
        if self._waiting is None:
            return
        self._running, self._waiting = self._waiting, None
        while self._unsent:
            _take_over(self._unsent.pop(), Path(self._running["staged"]))
        self._rows_before = len(self.rows())
        steps, up_to = self._kept()
        request = {
            **self._running,
            "to": self._to(),
            "journal": str(self.journal),
            "keep": steps,
            "keep_up_to": up_to,
            "patience": patience,
            "repository": {**dataclasses.asdict(self.repository), "token": None},
        }
        # It needs no accelerator, and no terminal.
        environment = {**outside_the_launch(), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if self.repository.token is not None:
            environment["HF_TOKEN"] = self.repository.token
        try:
            # In a session of its own, a signal to the run's group does not cut it short.
            self._process = subprocess.Popen(
                [*COMMAND, json.dumps(request)], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            self._note(self._running["step"], f"no process to push from: {error.strerror}")
            self._give_up(self._running)

    def _give_up(self, save: dict[str, Any]) -> None:
        """Let go of a save that did not arrive; where all checkpoints are wanted, the next push takes along its own."""
        if self.strategy == HubStrategy.ALL_CHECKPOINTS:
            self._unsent.append(Path(save["staged"]))
        else:
            shutil.rmtree(save["staged"], ignore_errors=True)

    def _kept(self) -> tuple[list[int], float]:
        """Checkpoints on the Hub that stay, by step and up to a step; another run's would be gone on from by mistake.

        Those up to the step that this run went on from are its own, whichever machine's journal knows of them.
        """
        if not self.pushes_checkpoints:
            return [], math.inf
        if self.strategy == HubStrategy.CHECKPOINT:
            return [], 0
        mine = {name for row in self.rows() if row.get("to") == self._to() for name in row.get("checkpoints", ())}
        return sorted(map(step_of, mine)), self._goes_on_from

    def _to(self) -> str:
        return f"{self.repository} ({self.strategy.value})"

    def _note(self, step: int, why: str) -> None:
        _record(self.journal, {"step": step, "to": self._to(), "failed": why})


def _take_over(old: Path, new: Path) -> None:
    """Put the checkpoints of one staged folder into another, wherever its push has left them."""
    for checkpoint in (*checkpoints_in(old / "beside"), *checkpoints_in(old / "root")):
        if not (new / "beside" / checkpoint.name).exists():
            checkpoint.rename(new / "beside" / checkpoint.name)
    shutil.rmtree(old, ignore_errors=True)


def _record(journal: Path, row: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"step {row['step']} was not pushed: {row['failed']}", flush=True)
    try:
        append_row(journal, row)
    except UserError as error:
        # The run's own files are what it must not lose; this one is only about pushes.
        print(error, flush=True)


def main() -> None:
    """One push, in a process of its own that ends with the run: the next launch takes up what it leaves."""
    end_with_parent()
    os.nice(10)
    request = json.loads(sys.argv[1])
    repository, staged = Repository(**request["repository"]), Path(request["staged"])
    row: dict[str, Any] = {"step": request["step"], "to": request["to"]}
    try:
        folder = make_publishable(staged, repository.name if "/" in repository.name else None)
        checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
        tell = lambda line: print(line, flush=True)  # noqa: E731
        keep = lambda step: step in request["keep"] or step <= request["keep_up_to"]  # noqa: E731
        words = {"keep": keep, "patience": request["patience"], "tell": tell}
        pushed = push_folder(folder, repository, request["message"], **words)
        row |= {**dataclasses.asdict(pushed), "checkpoints": checkpoints}
    # Whatever it is, it is for the journal.
    except Exception as error:
        text = str(error).replace(str(staged / "root"), "the save")
        row["failed"] = " ".join(text.split()) or type(error).__name__
    _record(Path(request["journal"]), row)


if __name__ == "__main__":
    main()

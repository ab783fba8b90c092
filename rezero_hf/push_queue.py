"""Pushing to the Hub while training goes on: each save from a process of its own, which training never waits for.

A save is taken over as hard links, so that the run may delete its checkpoint meanwhile. The process makes card and
figures, verifies the folder and pushes it; whatever goes wrong there, the run does not notice but by a line, and the
next save is tried like the first. `pushes.jsonl` beside the run says of every push which commit it became, or why none.
"""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy

from .callbacks import append_row
from .checkpoints import newest_complete, step_of
from .errors import UserError
from .launching import end_with_parent, outside_the_launch
from .publishing import Repository, push_folder
from .staging import complete, stage


JOURNAL = "pushes.jsonl"
# Seconds during which one push is tried again: the Hub counts commits by the hour.
PATIENCE = 3600.0
# And how long a run that is over otherwise waits for its last push.
LAST_PATIENCE = 900.0
# One push: a request as JSON is its last argument.
COMMAND = (sys.executable, "-m", "rezero_hf.push_queue")


class PushQueue(TrainerCallback):
    """Pushes a run's saves to one repository, one at a time; of those that wait only the newest is kept.

    Stands on the main process alone.

    Args:
        repository: where to.
        folder: the run's folder, for the journal and the staged files.
        strategy: `every_save` pushes the model, at the root of the repository; `checkpoint` also the newest checkpoint,
            `all_checkpoints` every one, as a folder `checkpoint-N` that a run can go on from on another machine
            (`--resume-from ORG/NAME`); `end` nothing before `put` is called.
    """

    def __init__(self, repository: Repository, folder: str | Path, strategy: str = "every_save"):
        self.repository = repository
        self.journal = Path(folder) / JOURNAL
        self.staging = Path(folder) / "push"
        self.strategy = HubStrategy(strategy)
        self._process: subprocess.Popen | None = None
        self._step = 0
        self._waiting: tuple[int, Path] | None = None
        self._newest: Path | None = None
        self._count = itertools.count()
        # Left by a launch that was killed.
        shutil.rmtree(self.staging, ignore_errors=True)

    def on_train_begin(self, args, state, control, **kwargs):
        """After a restart: what the journal does not know to be on the Hub is pushed now."""
        newest, _ = newest_complete(args.output_dir) if state.global_step else (None, None)
        pushed = [row["step"] for row in self.rows() if "commit" in row]
        if newest is not None and step_of(newest) > max(pushed, default=0):
            self._saved(newest)

    def on_save(self, args, state, control, **kwargs):
        self._saved(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_step_end(self, args, state, control, **kwargs):
        self._look()

    def rows(self) -> list[dict[str, Any]]:
        """The journal: `step` and `commit`, `attempts`, `seconds`, or `step` and `failed`."""
        lines = self.journal.read_text(encoding="utf-8").splitlines() if self.journal.exists() else []
        return [json.loads(line) for line in lines]

    def put(self, source: Path, step: int) -> None:
        """Have an export or a checkpoint pushed as soon as the one before it is. Takes as long as linking its files.

        With the strategies that say so, the newest checkpoint goes with it.
        """
        beside = self.strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        try:
            staged = stage(source, self.staging / str(next(self._count)), self._newest if beside else None)
        except OSError as error:
            self._note(step, f"{error.filename}: {error.strerror}")
            return
        if self._waiting is not None:
            shutil.rmtree(self._waiting[1], ignore_errors=True)
        self._waiting = (step, staged)
        self._look()

    def finish(self, model: Path, step: int) -> str:
        """Push the finished model, in place of what still waits; returns the line that says what came of it."""
        self.put(model, step)
        print(f"pushing {model} to {self.repository} ...", flush=True)
        line = self.close(LAST_PATIENCE)
        if "failed" in self.rows()[-1]:
            line += (
                f"\nIt is whole in {model}; push it later: python scripts/publish.py {model} {self.repository} --push"
            )
        return line

    def close(self, timeout: float) -> str | None:
        """Wait for what is still to be pushed, at most `timeout` seconds, and say what came of it.

        Returns:
            A line for the user: the last commit, or what is missing on the Hub and why. None if nothing was pushed.
        """
        deadline = time.monotonic() + timeout
        while self._look() and time.monotonic() < deadline:
            time.sleep(0.1)
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None
            self._note(self._step, f"not done in {timeout:.0f} s")
        shutil.rmtree(self.staging, ignore_errors=True)
        if not (rows := self.rows()):
            return None
        last = rows[-1]
        if "failed" in last:
            return f"step {last['step']} is not on the Hub: {last['failed']}"
        return f"step {last['step']} is on the Hub: {self.repository}, commit {last['commit']}"

    def _saved(self, checkpoint: Path) -> None:
        self._newest = checkpoint
        if self.strategy != HubStrategy.END:
            self.put(checkpoint, step_of(checkpoint))

    def _look(self) -> bool:
        """Start what waits once the process before has ended; returns whether anything is still to be done."""
        if self._process is not None:
            if self._process.poll() is None:
                return True
            if not any(row["step"] == self._step for row in self.rows()[-1:]):
                self._note(self._step, f"the process that pushes ended with {self._process.returncode}")
            self._process = None
        if self._waiting is None:
            return False
        (self._step, staged), self._waiting = self._waiting, None
        keep = () if self.strategy == HubStrategy.CHECKPOINT and (staged / "beside").exists() else ("checkpoint-*",)
        request = {
            "staged": str(staged),
            "step": self._step,
            "journal": str(self.journal),
            "keep": keep,
            "repository": {**dataclasses.asdict(self.repository), "token": None},
        }
        # It needs no accelerator.
        environment = {**outside_the_launch(), "CUDA_VISIBLE_DEVICES": ""}
        if self.repository.token is not None:
            environment["HF_TOKEN"] = self.repository.token
        self._process = subprocess.Popen([*COMMAND, json.dumps(request)], env=environment, stdin=subprocess.DEVNULL)
        return True

    def _note(self, step: int, why: str) -> None:
        _record(self.journal, {"step": step, "failed": why})


def _record(journal: Path, row: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"step {row['step']} was not pushed: {row['failed']}", flush=True)
    append_row(journal, row)


def main() -> None:
    """One push, in a process of its own that ends with the run: the next launch takes up what it leaves."""
    end_with_parent()
    request = json.loads(sys.argv[1])
    step, repository, staged = request["step"], Repository(**request["repository"]), Path(request["staged"])
    try:
        folder = complete(staged, repository.name if "/" in repository.name else None)
        pushed = push_folder(folder, repository, f"Step {step}", keep=request["keep"], patience=PATIENCE, tell=print)
        outcome = dataclasses.asdict(pushed)
    except (UserError, OSError) as error:
        outcome = {"failed": " ".join(str(error).split())}
    _record(Path(request["journal"]), {"step": step, **outcome})
    shutil.rmtree(staged, ignore_errors=True)


if __name__ == "__main__":
    main()

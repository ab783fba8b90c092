"""How fast a run really is: tokens per second, share of the hardware's peak, memory, time spent waiting for data."""

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import TrainingArguments

from .flops import flops_per_token, peak_for


T = TypeVar("T")


def forget_peak_memory() -> None:
    """Let what `peak_memory` says of this process begin now, as far as the system can: Linux can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Throughput:
    """Clock of a training run. Evaluating and saving stop it.

    Args:
        args: the training arguments; `peak_flops`, where they have it, overrides the table of devices.
        model: the model that trains.
    """

    def __init__(self, args: TrainingArguments, model: nn.Module):
        self._args, self._config = args, model.config
        self._peak, self._most_memory = peak_for(args), 0
        self.start()

    def start(self, run: float = 0.0, interval: float = 0.0, waited: float = 0.0, paused: float = 0.0) -> None:
        """Start the clock, of a run, an interval, a wait for data and pauses that have already taken some seconds."""
        now = time.perf_counter()
        self._run_start, self._interval_start, self._waited = now - run, now - interval, waited
        self._paused, self._pause_start = paused, None

    def state(self) -> dict[str, float]:
        """What `start` needs to go on in another process."""
        interval = time.perf_counter() - self._interval_start
        return {"run": self.seconds(), "interval": interval, "waited": self._waited, "paused": self._paused}

    def seconds(self) -> float:
        """Wall-clock seconds of the whole run so far, over all its launches."""
        return round(time.perf_counter() - self._run_start, 3)

    def training_seconds(self) -> float:
        """The same without evaluations and saves."""
        now = time.perf_counter() if self._pause_start is None else self._pause_start
        return round(now - self._run_start - self._paused, 3)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside does not count as training."""
        self._pause_start = time.perf_counter()
        yield
        took, self._pause_start = time.perf_counter() - self._pause_start, None
        self._interval_start += took
        self._paused += took

    def waiting_for(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, the time until each is there counted as waiting for data."""
        batches = iter(batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - started
            yield batch

    def interval(self, tokens: int, sequence_length: int) -> dict[str, float]:
        """What to log of the time since the last call.

        Args:
            tokens: trained on since then, over all processes.
            sequence_length: tokens per sequence, which set the share of attention.

        Returns:
            `tokens_per_second` of all devices together and per device; `mfu`, model FLOPs (`flops.flops_per_token`)
            over the device's dense peak in this precision, where that is known; `peak_memory_bytes` on this device
            since the last call (of this process since it began, on a CPU); `data_wait_fraction` of this process;
            `wall_seconds` of the run.
        """
        seconds = time.perf_counter() - self._interval_start
        rate = tokens / seconds
        found = {"tokens_per_second": rate, "tokens_per_second_per_device": rate / self._args.world_size}
        if self._peak:
            flops = flops_per_token(self._config, sequence_length)
            found["mfu"] = found["tokens_per_second_per_device"] * flops / self._peak
        found["peak_memory_bytes"] = self.peak_memory()
        found["data_wait_fraction"] = self._waited / seconds
        found["wall_seconds"] = self.seconds()
        self._interval_start, self._waited = time.perf_counter(), 0.0
        return found

    def peak_memory(self) -> int:
        """Bytes on this device since the last call, or of this process since it began, on a CPU."""
        if self._args.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._args.device)
            torch.cuda.reset_peak_memory_stats(self._args.device)
        else:
            # Kilobytes everywhere but on a Mac.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self._most_memory = max(self._most_memory, peak)
        return peak

    def most_memory(self) -> int:
        """The most that `peak_memory` has seen, now included."""
        self.peak_memory()
        return self._most_memory

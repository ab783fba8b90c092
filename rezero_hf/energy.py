"""The electricity that training takes, estimated by codecarbon where that is installed."""

import logging
from importlib.util import find_spec
from typing import Any


logger = logging.getLogger(__name__)


class EnergyMeter:
    """What this machine draws while a run trains: processors, memory and accelerators, whoever uses them.

    It asks nothing of the network and writes no file. What goes wrong in it is said once and ends no run.

    Args:
        on: measure, where codecarbon is installed. One process of a run does, for its own machine.
    """

    def __init__(self, on: bool = True):
        self._on, self._tracker, self._kwh = on and find_spec("codecarbon") is not None, None, None

    def start(self, kwh: float | None = None) -> None:
        """Begin to measure, of a run that has already taken so much."""
        self._next()
        if self._on:
            self._kwh = kwh or 0.0

    def kwh(self) -> float | None:
        """Taken so far, over all launches of the run; None where nothing measures."""
        if self._tracker is not None:
            self._next()
        return self._kwh

    def stop(self) -> None:
        """Measure no longer, until the next start; `kwh` stays as it is then."""
        self._next(last=True)
        self._tracker = None

    def record(self) -> dict[str, float]:
        """For a run's record: `energy_kwh`, or nothing."""
        return {} if (kwh := self.kwh()) is None else {"energy_kwh": round(kwh, 6)}

    def _next(self, last: bool = False) -> None:
        if not self._on or (last and self._tracker is None):
            return
        try:
            if self._tracker is None:
                self._tracker = _tracker()
            else:
                self._kwh += self._tracker.stop_task().energy_consumed
            if not last:
                self._tracker.start_task()
        except Exception as error:
            logger.warning("The run's energy is not measured: codecarbon failed (%s).", error)
            self._on, self._tracker, self._kwh = False, None, None


def _tracker() -> Any:
    from codecarbon import OfflineEmissionsTracker

    # It speaks before it looks at how much it is to say.
    logging.getLogger("codecarbon").setLevel(logging.ERROR)
    return OfflineEmissionsTracker(save_to_file=False, log_level="error", allow_multiple_runs=True)

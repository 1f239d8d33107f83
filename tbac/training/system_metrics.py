"""How busy a machine is while a run trains, measured in a thread."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tbac.training.delivery import describe_safely

log = logging.getLogger(__name__)
EVERY = 10.0  # seconds, as MLflow has it


class SystemMetrics:
    """Measures at once, and then every few seconds until it is stopped.

    Args:
        monitors: each has `collect_metrics`, `aggregate_metrics` and `clear_metrics`, as MLflow's have.
        send: takes the metrics of one measurement, and its number.
        every: seconds between two.
    """

    def __init__(
        self, monitors: Sequence[Any], send: Callable[[Mapping[str, float], int], None], every: float = EVERY
    ) -> None:
        self.monitors, self.send, self.every = list(monitors), send, every
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stopped.is_set():
            try:
                self.send(self._measure(), number)
            except Exception as error:  # noqa: BLE001  whatever a driver says, training goes on
                log.warning("the machine isn't measured any more (%s)", describe_safely(error))
                return
            number += 1
            self._stopped.wait(self.every)

    def _measure(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for monitor in self.monitors:
            monitor.collect_metrics()
            metrics |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return metrics

    def stop(self) -> None:
        """Measure no more."""
        self._stopped.set()
        self._thread.join(1.0)  # one that hangs in a driver ends with the process

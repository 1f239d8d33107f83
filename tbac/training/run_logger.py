"""The logger of a run: whatever it wraps, steps are counted over all stages, and only weights may end training."""

import logging
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger

from tbac.training.delivery import describe_safely
from tbac.training.interruptions import INTERRUPTION

log = logging.getLogger(__name__)


def log_nowhere(trainer: Any) -> None:
    """Give a process that logs nothing a dummy logger: with none it would skip the reductions that all must run."""
    trainer.loggers = [DummyLogger()]


class RunLogger(Logger):
    """Logs the fits of one run to one logger: steps are counted over all fits, and only `close` ends the run.

    An error of the logger is reported once and passed over: only weights may end training.

    Args:
        logger: the logger that everything is passed to.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self.logger = logger
        self.first_step = 0  # optimizer steps of the run before the fit that logs now
        self._failing: set[str] = set()

    def _try(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the logger; returns None when it fails."""
        name = call.__name__
        try:
            result = call(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  whatever a logger raises
            if name not in self._failing:
                message = "%s.%s failed (%s); training goes on, and later failures of it aren't reported"
                log.warning(message, type(self.logger).__name__, name, describe_safely(error))
            self._failing.add(name)
            return None
        self._failing.discard(name)
        return result

    def _read(self, name: str) -> Any:
        """Read an attribute of the logger; None when that fails."""

        def read() -> Any:
            return getattr(self.logger, name)

        return self._try(read)

    @property
    def name(self) -> str | None:
        return self._read("name")

    @property
    def version(self) -> int | str | None:
        return self._read("version")

    @property
    def save_dir(self) -> str | None:
        return self._read("save_dir")

    @property
    def log_dir(self) -> str | None:
        return self._read("log_dir")

    @property
    def group_separator(self) -> str:
        return self.logger.group_separator

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        own = {name: value for name, value in metrics.items() if name != "epoch"}  # Lightning's, which is always 0
        self._try(self.logger.log_metrics, own, None if step is None else self.first_step + step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._try(self.logger.log_hyperparams, params, *args, **kwargs)

    def save(self) -> None:
        self._try(self.logger.save)

    def finalize(self, status: str) -> None:
        """Called at the end of a fit; only a fit that failed ends the run."""
        if status == "success":
            self.save()
        else:
            self.close(status)

    def close(self, status: str = "success") -> None:
        """End the run; one that a signal has ended is said to be killed, not failed."""
        if status != "success" and INTERRUPTION.received is not None:
            status = "killed"
        self._try(self.logger.finalize, status)

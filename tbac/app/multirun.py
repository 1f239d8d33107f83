"""Multiruns: each point has a folder of its own, and one that fails is one that fails."""

import itertools
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tbac.app.arguments import quote
from tbac.app.errors import describe_error, is_user_error, print_error
from tbac.app.folders import name_point
from tbac.files import write_whole

if TYPE_CHECKING:
    from tbac.training.tracking import ParentRun

log = logging.getLogger(__name__)
FAILED = "failed.txt"
MODULE = "hydra_plugins.tbac"  # Hydra takes sweepers of the package hydra_plugins alone
SWEEPER = f"{MODULE}.PointSweeper"
MLFLOW = "tbac.training.tracking.make_mlflow_logger"


@dataclass(frozen=True)
class PointFailure:
    """What a point of a multirun returns when it failed.

    Attributes:
        folder: its run folder.
        message: why it failed.
    """

    folder: str
    message: str

    @staticmethod
    def forget(folder: Path) -> None:
        """Remove the note of an earlier failure."""
        (folder / FAILED).unlink(missing_ok=True)


def note_failure(folder: Path, message: str) -> PointFailure:
    """Say that a point failed, on the screen and in a file of its folder."""
    print_error(f"{folder.name}: {message}")
    write_whole(folder / FAILED, f"{message}\n".encode())
    return PointFailure(str(folder), message)


class PointsCallback(Callback):
    """A callback of Hydra's that looks at the points of a multirun, before and after they run."""

    def check_point(self, config: DictConfig, folder: Path) -> None:
        """Check a point before any is started, on machines that start them later.

        Args:
            config: of the point, with what Hydra needs itself.
            folder: of its run.

        Raises:
            ValueError: for whatever would end it.
        """

    def tell_points(self, config: DictConfig, varied: Sequence[str]) -> None:
        """Say what came out, when all points have ended.

        Args:
            config: of the multirun, with what Hydra needs itself.
            varied: keys that it varies.
        """


class PointSweeper(Sweeper):
    """Runs every combination of the values that a multirun lists, as Hydra's own sweeper does.

    Each point has a folder that is named by its overrides, and is never another point's. When points fail, or can't be
    composed, the others run; then the multirun ends with exit status 1 and names those that failed.

    Args:
        max_batch_size: as Hydra's sweeper has it; all points are launched together.
        params: key -> values, besides those of the command line.
    """

    def __init__(self, max_batch_size: int | None = None, params: dict[str, str] | None = None) -> None:
        self.params = dict(params or {})
        self.config: DictConfig | None = None
        self.context: HydraContext | None = None
        self.launcher: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run all points.

        Args:
            arguments: overrides, some of them with several values.
        """
        assert self.config is not None
        assert self.context is not None
        lines = [f"{key}={values}" for key, values in self.params.items()]
        overrides = OverridesParser.create(config_loader=self.context.config_loader).parse_overrides(lines + arguments)
        points, varied = combine_overrides(overrides)
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        # A folder that the user names is left to the user.
        names_folders = any(line.startswith("hydra.sweep.subdir=") for line in self.config.hydra.overrides.hydra)
        failures: list[PointFailure] = []
        jobs, configs = [], []
        for point in points:
            name = name_point(point, varied)
            job = point if names_folders else [*point, f"hydra.sweep.subdir={quote(name)}"]
            composed = self._try_to_compose(job, folder / name)
            if isinstance(composed, PointFailure):
                failures.append(composed)
            else:
                jobs.append(job)
                configs.append(composed)
        # Runs in MLflow are children of one, unless another command has begun it.
        parent = begin_parent_run(configs[0], varied, folder) if configs else None
        if parent is not None and parent.run_id:
            jobs = [[*job, f"parent_run_id={parent.run_id}"] for job in jobs]
        try:
            results: Sequence[JobReturn] = self.launcher.launch(jobs, initial_job_idx=0) if jobs else []
            failures += [r.return_value for r in results if isinstance(r.return_value, PointFailure)]
        except BaseException as end:
            if parent is not None:
                from tbac.training.tracking import describe_end

                parent.finish(describe_end(end))
            raise
        for callback in self._list_callbacks():
            callback.tell_points(self.config, varied)
        if parent is not None:
            parent.finish("failed" if failures else "success")
            print_links(parent, folder)
        finish_multirun(len(points), failures)
        return results

    def _list_callbacks(self) -> list[PointsCallback]:
        assert self.context is not None
        return [callback for callback in self.context.callbacks.callbacks if isinstance(callback, PointsCallback)]

    def _try_to_compose(self, job: list[str], folder: Path) -> PointFailure | DictConfig:
        """Compose the config of a point and check it; what can't be composed, or trained, is a point that failed."""
        assert self.context is not None
        assert self.config is not None
        try:
            config = self.context.config_loader.load_sweep_config(self.config, job)
            for callback in self._list_callbacks():
                callback.check_point(config, folder)
            return config
        except Exception as error:
            if not is_user_error(error):
                raise
            folder.mkdir(parents=True, exist_ok=True)
            return note_failure(folder, describe_error(error))


# Under this name Hydra registers the class, and finds it again by an import.
PointSweeper.__module__ = MODULE
sys.modules[MODULE] = sys.modules[__name__]


def begin_parent_run(cfg: DictConfig, varied: Sequence[str], folder: Path) -> "ParentRun | None":
    """Begin the run in MLflow whose children the points of a multirun are; one that was begun in the folder goes on.

    Args:
        cfg: of the first point.
        varied: keys that the multirun varies, by which the run is named.
        folder: of the multirun.

    Returns:
        The run; None for points that log elsewhere, or have a parent already.
    """
    logger = cfg.get("logger")
    if "parent_run_id" not in cfg or cfg.parent_run_id or not logger or logger.get("_target_") != MLFLOW:
        return None
    from tbac.training.tracking import ParentRun  # torch and Lightning, which the points need anyway

    name = " x ".join(key.split(".")[-1] for key in varied) or "multirun"
    return ParentRun(logger.tracking_uri, logger.experiment_name, name, str(folder / "mlflow_run_id"))


def print_links(parent: "ParentRun", folder: Path) -> None:
    """Print where a multirun is, and the pages of its runs."""
    from tbac.training.interruptions import outlast_terminal

    links = parent.list_links()
    with outlast_terminal():
        print(f"\nthe multirun's folder: {folder}")
        for name, link in links.items():
            print(f"{name} (make ui serves it): {link}")


def read_varied_overrides() -> dict[str, str]:
    """Read what this point of a multirun has in the place of several values: key -> value; nothing outside of one."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return {}
    hydra = HydraConfig.get()
    try:
        whole = OmegaConf.load(Path(hydra.sweep.dir) / "multirun.yaml").hydra
        lines = [*whole.overrides.task, *(f"{key}={values}" for key, values in (whole.sweeper.params or {}).items())]
        parser = OverridesParser.create()
        varied = {o.get_key_element().lstrip("+~") for o in parser.parse_overrides(lines) if o.is_sweep_override()}
    except (OSError, OmegaConfBaseException, HydraException, AttributeError):
        return {}  # the names of runs are shorter then
    own = parser.parse_overrides(list(hydra.overrides.task))
    found = {override.get_key_element().lstrip("+~"): override.get_value_element_as_str() for override in own}
    return {key: value for key, value in found.items() if key in varied}


def combine_overrides(overrides: Sequence[Override]) -> tuple[list[list[str]], list[str]]:
    """Combine the values that overrides list.

    Returns:
        The overrides of each point, and the keys that have several values.
    """
    values: dict[str, list[str]] = {}
    varied = []
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
            continue
        if not override.is_discrete_sweep():
            raise HydraException(f"{override.input_line}: a sweep lists its values, as {key}=a,b")
        values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        varied.append(key.lstrip("+~"))
    return [list(point) for point in itertools.product(*values.values())], varied


def finish_multirun(count: int, failures: Sequence[PointFailure]) -> None:
    """Say how many points finished; with exit status 1 when some failed."""
    if not failures:
        return
    lines = [f"  {Path(failure.folder).name}: {failure.message}" for failure in failures]
    print_error(f"{count - len(failures)} of {count} points finished; these failed:\n" + "\n".join(lines))
    sys.exit(1)

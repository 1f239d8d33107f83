"""What happens around a command: its line is read, its config checked, and its mistakes are told."""

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tbac.app.arguments import quote, read_arguments
from tbac.app.errors import describe_error, is_user_error, print_error, report_user_errors
from tbac.app.folders import claim_folder
from tbac.app.help import describe_options
from tbac.app.making import make_part
from tbac.app.multirun import SWEEPER, PointFailure, PointSweeper, note_failure
from tbac.app.options import check_config, find_kind
from tbac.files import write_whole
from tbac.redaction import hide_in_text, hide_secrets_in_logs

log = logging.getLogger(__name__)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it warns that an optional package is missing
OURS = "TBAC_ASKED_FOR_FULL_ERRORS"  # in the environment: HYDRA_FULL_ERROR was set by a command, not by its user
CONF = str(Path(__file__).resolve().parents[2] / "conf")  # absolute: commands run as files and as modules


def command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Decorate the main function of a command.

    Texts and paths on the command line are read as they are, the config is checked before the function begins, and what
    a user, a file or the machine got wrong ends the command with one message and exit status 1. In a multirun it ends
    that point alone. No two processes have the same run folder.

    Args:
        config_name: of the command's file in conf/.
    """

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @wraps(main)
        def run(cfg: DictConfig) -> Any:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                return run_point(main, config_name, cfg)
            return report_user_errors(partial(run_checked, main, config_name))(cfg)

        started_by_hydra = hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)(run)

        @wraps(main)
        def start() -> None:
            if {"--help", "-h"} & set(sys.argv[1:]):
                print(describe_options(Path(CONF), config_name, name_script(), sys.argv[1:]))
                return
            quiet_libraries()
            hide_secrets_in_logs()
            start_hydra(started_by_hydra, config_name)

        return start

    return decorate


def start_hydra(main: Callable[[], Any], config_name: str) -> None:
    """Let Hydra compose the config and call `main`; what it finds wrong is told as our own errors are."""
    Plugins.instance().register(PointSweeper)
    # A command that another one has started inherits what that one has set for itself.
    given = sys.argv
    before = None if OURS in os.environ else os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [given[0], *prepare_arguments(given[1:], config_name)]
    os.environ |= {"HYDRA_FULL_ERROR": "1", OURS: "1"}  # Hydra raises its errors instead of printing them
    try:
        main()
    except Exception as error:
        if before or not is_user_error(error):
            raise
        print_error(describe_error(error))
        sys.exit(1)
    finally:
        sys.argv = given
        os.environ.pop(OURS, None)
        if before is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)


def prepare_arguments(arguments: Sequence[str], config_name: str) -> list[str]:
    """Prepare the arguments of a command for Hydra: texts are quoted, and points of a sweep are run by our sweeper."""
    multirun = bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments))
    multirun = multirun or any(argument.startswith("sweep=") for argument in arguments)
    prepared = read_arguments(arguments, partial(find_kind, config_name), multirun)
    chosen = any(argument.startswith(("hydra/sweeper=", "hydra.sweeper._target_=")) for argument in arguments)
    asks_hydra = any(argument.startswith("-") and argument not in ("-m", "--multirun") for argument in arguments)
    if multirun and not chosen and not asks_hydra:
        prepared.append(f"hydra.sweeper._target_={SWEEPER}")
    return prepared


def run_checked(main: Callable[[DictConfig], Any], config_name: str, cfg: DictConfig) -> Any:
    """Check the config, and call the function of the command while its run folder is this process's own."""
    hide_secrets_in_files(get_run_folder())
    check(config_name, cfg)
    with claim_folder(get_run_folder()):
        return main(cfg)


def hide_secrets_in_files(folder: Path) -> None:
    """Hide secrets in the files in which Hydra has noted config and command line."""
    for file in [*(folder / ".hydra").glob("*.yaml"), folder.parent / "multirun.yaml"]:
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8", errors="surrogateescape")
        hidden = hide_in_text(text)
        if hidden != text:
            write_whole(file, hidden.encode(errors="surrogateescape"))


def run_point(main: Callable[[DictConfig], Any], config_name: str, cfg: DictConfig) -> Any:
    """Run one point of a multirun; one that fails is noted in its folder, and the others go on."""
    folder = get_run_folder()
    try:
        result = run_checked(main, config_name, cfg)
    except SystemExit as end:
        if not isinstance(end.code, int) or not 0 < end.code < 128:  # a signal ends the whole multirun
            raise
        return note_failure(folder, f"it ended with exit status {end.code}")
    except Exception as error:
        if is_user_error(error):
            return note_failure(folder, describe_error(error))
        log.exception("an error of the program")
        return note_failure(folder, f"{type(error).__name__}: {error}")
    PointFailure.forget(folder)
    return result


def compose_checked(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose the config of a command within another command, and check it as if it had been started.

    Args:
        config_name: of its file in conf/.
        overrides: as on a command line.
    """
    cfg = compose_as_given(config_name, overrides)
    check(config_name, cfg)
    return cfg


def compose_as_given(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose the config of a command within another command, without a check of what is in it."""
    return compose(config_name, read_arguments(overrides, partial(find_kind, config_name)))


def check(config_name: str, cfg: DictConfig) -> None:
    """Raise ValueError for options that a command can't be started with."""
    check_config(config_name, cfg)
    check_model(cfg)


def check_model(cfg: DictConfig) -> None:
    """Raise ValueError for options of a model that its dataclasses refuse; these import no torch."""
    if "model" not in cfg:
        return
    if not isinstance(cfg.model, DictConfig):
        raise ValueError(f"model must be a mapping of its options, got {cfg.model!r}")
    for group, place in (("taps", cfg.get("taps")), ("ladder", cfg.get("ladder"))):
        if not isinstance(place, DictConfig):
            raise ValueError(f"{group} must be a mapping of its options, got {place!r}; choose one with {group}=NAME")
    if not cfg.taps.get("_partial_"):
        raise ValueError("taps names its rule without _partial_: true; it is called later, with the model's sizes")
    make_part(cfg.model, "model")


def record_config(cfg: DictConfig) -> None:
    """Write what Hydra composed into `.hydra` of the run folder, as Hydra itself does before a command begins.

    A command whose config says `hydra.output_subdir: null` calls this once the config is accepted, so that a run that
    is refused changes nothing of what the folder says.
    """
    parts = {"config": cfg, "hydra": OmegaConf.create({"hydra": HydraConfig.get()})}
    for name, part in [*parts.items(), ("overrides", HydraConfig.get().overrides.task)]:
        text = hide_in_text(OmegaConf.to_yaml(part))
        write_whole(get_run_folder() / ".hydra" / f"{name}.yaml", text.encode(errors="surrogateescape"))


def describe_command() -> str:
    """Describe the command line that goes on with this run, or this multirun, in its own folder."""
    config = HydraConfig.get()
    option, folder = "hydra.run.dir", str(get_run_folder())
    if config.mode == RunMode.MULTIRUN:
        option, folder = "hydra.sweep.dir", str(Path(config.sweep.dir))
    if Path(folder).is_relative_to(Path.cwd()):
        folder = str(Path(folder).relative_to(Path.cwd()))
    ours = (f"{option}=", "hydra.sweeper._target_=")
    given = [argument for argument in sys.argv if not argument.startswith(ours)]
    return hide_in_text(shlex.join([sys.orig_argv[0], *given, f"{option}={quote(folder)}"]))


def name_script() -> str:
    """Name the file of this command as its user would call it."""
    script = Path(sys.argv[0]).resolve()
    root = Path(CONF).parent
    return str(script.relative_to(root) if script.is_relative_to(root) else script)


def get_run_folder() -> Path:
    """Return the run folder that Hydra made."""
    return Path(HydraConfig.get().runtime.output_dir)


def to_plain(cfg: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """Convert a config to built-in types, with interpolations resolved or left as they are written."""
    container = OmegaConf.to_container(cfg, resolve=resolve)
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}


def quiet_libraries() -> None:
    """Silence warnings of libraries that no user can act on."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    warnings.filterwarnings("ignore", message=".*Grad strides do not match.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec.*")
    warnings.filterwarnings("ignore", message=".*module.s. in eval mode at the start of training.*")
    for name in ("alembic", "mlflow", "torchao", "httpx", "lightning.pytorch.utilities.rank_zero", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)

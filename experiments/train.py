"""Train one stage, or several in sequence.

python experiments/train.py stage=t2i_pretrain world=shapes
python experiments/train.py 'stages=[t2i_pretrain,ti2i_pretrain,finetune]' world=shapes
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, read_write

from experiments.stage_configs import compose_stages, has_unsent_records, is_finished
from tbac.app import (
    command,
    describe_command,
    get_run_folder,
    keep_freed_memory,
    record_config,
)

log = logging.getLogger(__name__)


def tell_finished(configs: Sequence[DictConfig]) -> None:
    """Say that the run of this folder was finished before, and which options it wasn't trained with.

    Raises:
        ValueError: for options that make it another run.
    """
    from experiments.training_run import describe_finished

    log.info("finished before; give stage.steps=… for more steps")
    changes = describe_finished(configs, get_run_folder())
    if changes:
        log.warning("it was trained with other options, and nothing of these is used now: %s", ", ".join(changes))


def warn_of_other_validation(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Warn where a run has sources of its own, and the validation of the world's pictures."""
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    if "stage.sources" in given and "stage.val_sources" not in given and cfg.stage.val_sources:
        paths = ", ".join(str(source.path) for source in cfg.stage.val_sources)
        log.warning("stage.sources was given without stage.val_sources: the validation loss is of %s", paths)


@contextmanager
def act_as_only_run() -> Iterator[None]:
    """Give this process the arguments of this run alone, and restore them afterwards.

    Lightning starts the other processes of a run with the arguments of this one. In a multirun these would begin the
    whole sweep again in each of them.
    """
    from torch import distributed

    config: Any = HydraConfig.get()
    arguments, environment = sys.argv, dict(os.environ)
    if config.mode == RunMode.MULTIRUN:
        sys.argv = [sys.argv[0], *config.overrides.task]
        with read_write(config):
            config.run.dir = config.runtime.output_dir
    try:
        yield
    finally:
        sys.argv = arguments
        if distributed.is_initialized():
            distributed.destroy_process_group()
        # Lightning has set rank and address, which the next run of the sweep must choose anew.
        for name in set(os.environ) - set(environment):
            del os.environ[name]


@command("train")
def main(cfg: DictConfig) -> None:
    keep_freed_memory()
    overrides = HydraConfig.get().overrides.task
    configs = compose_stages(cfg, overrides)
    warn_of_other_validation(cfg, overrides)
    if "slurm" in cfg.machine and "SLURM_JOB_ID" not in os.environ:
        from experiments.submitting import submit_run

        submit_run(cfg, configs, overrides)
        return
    if is_finished(configs, get_run_folder()):
        tell_finished(configs)
        if has_unsent_records(get_run_folder()):
            from experiments.training_run import send_unsent

            send_unsent(cfg)
        return
    # Lightning and diffusers take seconds to import, so the configs are checked before.
    from experiments.closing import print_closing, print_interruption
    from experiments.training_run import train
    from tbac.training.strategies import read_process_rank

    if read_process_rank():  # all processes but the first log only warnings
        logging.getLogger().setLevel(logging.WARNING)
    going_on = describe_command()
    log.info("the run folder is %s; after any end this command goes on there: %s", get_run_folder(), going_on)
    try:
        with act_as_only_run():
            # A job of a cluster leaves what was written when it was submitted.
            recorded = "slurm" in cfg.machine and (get_run_folder() / ".hydra").is_dir()
            report = train(configs, get_run_folder(), None if recorded else partial(record_config, cfg))
    except (SystemExit, KeyboardInterrupt) as end:
        status = end.code if isinstance(end, SystemExit) else 130
        if isinstance(status, int) and status >= 128:
            print_interruption()
        raise SystemExit(status) from None
    for stage in report.get("stages", [report]):
        log.info("%s: %d steps, validation loss %s -> %s", *list(stage.values())[:4])
    if HydraConfig.get().mode != RunMode.MULTIRUN and not read_process_rank():
        print_closing(cfg, report)


if __name__ == "__main__":
    main()

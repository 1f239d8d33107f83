"""Train one stage, or several in sequence.

python experiments/train.py stage=t2i_pretrain world=shapes
python experiments/train.py 'stages=[t2i_pretrain,ti2i_pretrain,finetune]' world=shapes
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, read_write

from experiments.stage_configs import compose_stages, is_finished
from tbac.app import CONF, get_run_folder, keep_freed_memory, report_user_errors, to_plain

log = logging.getLogger(__name__)


def submit_job(configs: Sequence[DictConfig], overrides: Sequence[str]) -> None:
    """Submit these stages instead of training here."""
    from experiments.slurm import submit
    from experiments.training_run import find_init
    from tbac.models.saved import read_checkpoint

    folder = get_run_folder().absolute()
    init = find_init(configs[0])  # settled now, so that all processes start from the same
    if init and Path(init).is_file():
        read_checkpoint(init)
    arguments = [o for o in overrides if o.split("=")[0] != "init"]
    arguments += [f"init='{Path(init).absolute()}'"] if init else []
    launcher = {**to_plain(HydraConfig.get().launcher), "name": f"tbac-{configs[0].stage.name}"}
    job = submit(launcher, folder, arguments)
    print(f"submitted job {job}; its log is {folder / f'slurm-{job}.log'}")


@contextmanager
def act_as_only_run() -> Iterator[None]:
    """Let Lightning start the other processes of this point of a sweep as if it were the only one, and clean up.

    It starts them with this process's own arguments, which would begin the whole sweep again in each of them.
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
        for name in set(os.environ) - set(environment):  # the rank and the address of this point
            del os.environ[name]


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
@report_user_errors
def main(cfg: DictConfig) -> None:
    keep_freed_memory()
    overrides = HydraConfig.get().overrides.task
    configs = compose_stages(cfg, overrides)
    if "slurm" in cfg.machine and "SLURM_JOB_ID" not in os.environ:
        submit_job(configs, overrides)
        return
    if is_finished(configs, get_run_folder()):
        log.info("finished before; give stage.steps=… for more steps")
        return
    # What trains takes seconds to import: only once the configs are known to fit together.
    from experiments.training_run import train
    from tbac.training.strategies import read_process_rank

    if read_process_rank():  # the others say only what is wrong
        logging.getLogger().setLevel(logging.WARNING)
    with act_as_only_run():
        report = train(configs, get_run_folder())
    for stage in report.get("stages", [report]):
        log.info("%s: %d steps, validation loss %s -> %s", *list(stage.values())[:4])


if __name__ == "__main__":
    main()

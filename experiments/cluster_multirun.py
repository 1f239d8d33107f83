"""A multirun on a cluster: its points are checked before they are submitted, and run a copy of this code.

It begins again from the copy as a whole, since points compose their configs in their jobs, from the folder of configs
that the multirun was started with.
"""

import os
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict, read_write

from experiments.copied_code import FOLDER, ROOT, copy_code, export_path
from experiments.stage_configs import compose_stages
from tbac.app import check, quote
from tbac.app.multirun import PointsCallback


class ClusterMultirun(PointsCallback):
    """Hydra's callback for multiruns on a cluster."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Begin the multirun again from a copy; in that copy, tell its jobs where it is."""
        if not config.machine.slurm.copy_code:
            return
        sweep = Path(config.hydra.sweep.dir).absolute()
        if sweep / FOLDER in ROOT.parents:
            with read_write(config), open_dict(config):
                config.hydra.launcher.setup = [*(config.hydra.launcher.setup or []), export_path(ROOT)]
            return
        code = copy_code(sweep)
        script = code / "experiments" / Path(sys.argv[0]).name
        before = os.environ.get("PYTHONPATH")
        path = os.pathsep.join(filter(None, (str(code), before)))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
        # The folder is given too: a time-stamped one would be another the next second.
        command = [sys.executable, str(script), *sys.argv[1:], f"hydra.sweep.dir={quote(str(sweep))}"]
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, command, environment)

    def check_point(self, config: DictConfig, folder: Path) -> None:
        """Check a point as a single run is checked before it is submitted.

        Args:
            config: of the point, with what Hydra needs itself.
            folder: of its run.

        Raises:
            ValueError: for whatever would end its job.
        """
        # Torch and Lightning are imported only where points are submitted.
        from experiments.submitting import check_before_submission

        if not config.submit:
            raise ValueError("submit=false shows the job of a single run; leave -m and the lists of values out")
        known = HydraConfig.instance()
        before = known.cfg
        # Paths of the config are those of the point's own folder.
        with read_write(config), open_dict(config):
            config.hydra.runtime.output_dir = str(folder)
        known.set_config(config)
        try:
            overrides = list(config.hydra.overrides.task)
            cfg = config.copy()
            with read_write(cfg), open_dict(cfg):
                del cfg.hydra
            check("train", cfg)
            check_before_submission(compose_stages(cfg, overrides), overrides)
        finally:
            known.cfg = before

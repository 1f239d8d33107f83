"""Build the shapes world: python data_prep/shapes/build.py"""

import logging
import sys

import hydra
from omegaconf import DictConfig

from tbac.app import CONF, report_user_errors

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONF, config_name="shapes")
@report_user_errors
def main(cfg: DictConfig) -> None:
    from data_prep.shapes.parts import build_world  # torch and diffusers, only when the config is right

    log.info("the shapes world is in %s", build_world(cfg))


if __name__ == "__main__":
    sys.exit(main())

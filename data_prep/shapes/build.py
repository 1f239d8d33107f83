"""Build the shapes world: python data_prep/shapes/build.py"""

import logging
import sys

from omegaconf import DictConfig

from tbac.app import command

log = logging.getLogger(__name__)


@command("shapes")
def main(cfg: DictConfig) -> None:
    from data_prep.shapes.parts import build_world  # torch and diffusers, only when the config is right

    log.info("the shapes world is in %s", build_world(cfg))


if __name__ == "__main__":
    sys.exit(main())

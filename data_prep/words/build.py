"""Build the world of words: python data_prep/words/build.py"""

import logging
import sys

from omegaconf import DictConfig

from tbac.app import command

log = logging.getLogger(__name__)


@command("words")
def main(cfg: DictConfig) -> None:
    from data_prep.words.parts import build_world  # torch and diffusers, only when the config is right

    log.info("the world of words is in %s", build_world(cfg))


if __name__ == "__main__":
    sys.exit(main())

"""Sizes of targets beside their shards, for aspect-ratio buckets: python data_prep/index_sizes.py path=DIR"""

import logging
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import hydra
from omegaconf import DictConfig
from tqdm import tqdm

from experiments.common import CONF, user_errors
from tbac.data.sizes import write_sizes

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONF, config_name="index_sizes")
@user_errors
def main(cfg: DictConfig) -> None:
    folder = Path(cfg.path).expanduser()
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ValueError(f"path={cfg.path} holds no *.tar")
    if cfg.processes < 1:
        raise ValueError(f"processes must be at least 1, got {cfg.processes}")
    with ProcessPoolExecutor(cfg.processes, mp_context=get_context("spawn")) as pool:
        counts = list(tqdm(pool.map(write_sizes, tars), total=len(tars), unit="shard", desc="reading sizes"))
    log.info("%s: the sizes of %d samples in %d shards are kept beside them", folder, sum(counts), len(tars))


if __name__ == "__main__":
    main()

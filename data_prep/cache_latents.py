"""Latents of target images into copies of shards: python data_prep/cache_latents.py path=DIR denoiser=DIR out=DIR"""

import logging
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from data_prep.shards.latents import cache_latents
from tbac.app import CONF, pick_device, plain, user_errors
from tbac.data.buckets import parse_buckets
from tbac.data.decoding import check_reducing_gap
from tbac.models.autoencoder import FrozenAutoencoder
from tbac.models.qwen import DTYPES
from tbac.models.sources import DENOISER_FILES, local_folder, read_config
from tbac.models.weights import autoencoder_digest

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONF, config_name="cache_latents")
@user_errors
def main(cfg: DictConfig) -> None:
    source, out = Path(cfg.path).expanduser(), Path(cfg.out).expanduser().absolute()
    for name in ("dtype", "encode_dtype"):
        if cfg[name] not in DTYPES:
            raise ValueError(f"{name} must be one of {', '.join(DTYPES)}; got {cfg[name]!r}")
    if not source.is_dir():
        raise ValueError(f"path={cfg.path} isn't a folder of shards")
    if out == source.absolute():
        raise ValueError("out= must be another folder than path=: the shards are copied")
    if cfg.image_size < 1 or cfg.batch_size < 1 or not 0 <= cfg.rank < cfg.world_size:
        raise ValueError(
            f"image_size={cfg.image_size} and batch_size={cfg.batch_size} must be at least 1, and rank={cfg.rank} "
            f"below world_size={cfg.world_size}"
        )
    buckets = parse_buckets(plain(cfg)["buckets"], cfg.image_size)
    check_reducing_gap(cfg.reducing_gap, "reducing_gap")
    read_config("denoiser", cfg.denoiser, "vae/config.json")
    folder = local_folder("denoiser", cfg.denoiser, DENOISER_FILES)
    autoencoder = FrozenAutoencoder.from_folder(folder / "vae", DTYPES[cfg.encode_dtype])  # weights are read when used
    step, name = autoencoder.compression, "buckets" if buckets else f"image_size={cfg.image_size}"
    if any(side % step for size in (buckets.sizes if buckets else [(cfg.image_size,)]) for side in size):
        raise ValueError(f"{name}: sides must be a multiple of {step}, which the autoencoder needs")
    device = pick_device(cfg.device)
    if device.type == "cuda" and cfg.world_size > 1:
        device = torch.device("cuda", cfg.rank % torch.cuda.device_count())
    cache_latents(
        source,
        out,
        autoencoder,
        autoencoder_digest(folder),
        cfg.image_size,
        cfg.batch_size,
        DTYPES[cfg.dtype],
        cfg.keep_images,
        cfg.rank,
        cfg.world_size,
        str(device),
        buckets,
        cfg.reducing_gap,
    )


if __name__ == "__main__":
    main()

"""Copies shards with latents of their targets: python data_prep/cache_latents.py path=DIR denoiser=DIR out=DIR"""

from pathlib import Path

from omegaconf import DictConfig

from tbac.app import command, pick_device, to_plain


@command("cache_latents")
def main(cfg: DictConfig) -> None:
    # A wrong path is reported at once, before torch and diffusers are imported.
    source, out = Path(cfg.path), Path(cfg.out).absolute()
    if not source.is_dir():
        raise ValueError(f"path={cfg.path} isn't a folder of shards")
    if out == source.absolute():
        raise ValueError("out= must be another folder than path=: the shards are copied")
    if not 0 <= cfg.rank < cfg.world_size:
        raise ValueError(f"rank={cfg.rank} must be at least 0 and below world_size={cfg.world_size}")

    import torch

    from data_prep.shards.latents import CachingOptions, cache_latents
    from tbac.data.buckets import parse_buckets
    from tbac.models.autoencoder import FrozenAutoencoder
    from tbac.models.qwen import DTYPES
    from tbac.models.sources import DENOISER_FILES, locate_folder, read_config
    from tbac.models.weights import compute_autoencoder_digest

    # The processes of a node share its GPUs, one each.
    device = pick_device(cfg.device)
    if device.type == "cuda" and cfg.world_size > 1:
        device = torch.device("cuda", cfg.rank % torch.cuda.device_count())
    options = CachingOptions(
        cfg.image_size,
        parse_buckets(to_plain(cfg)["buckets"], cfg.image_size),
        cfg.reducing_gap,
        DTYPES[cfg.dtype],
        cfg.keep_images,
        cfg.batch_size,
        str(device),
    )
    # Sides that the autoencoder can't encode are refused before its weights are read.
    read_config("denoiser", cfg.denoiser, "vae/config.json")
    folder = locate_folder("denoiser", cfg.denoiser, DENOISER_FILES)
    autoencoder = FrozenAutoencoder.from_folder(folder / "vae", DTYPES[cfg.encode_dtype])
    options.check_sides(autoencoder.compression)
    cache_latents(source, out, autoencoder, compute_autoencoder_digest(folder), options, (cfg.rank, cfg.world_size))


if __name__ == "__main__":
    main()

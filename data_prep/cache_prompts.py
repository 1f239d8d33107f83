"""Fills a prompt cache ahead of training: python data_prep/cache_prompts.py world=shapes prompt_cache.folder=DIR"""

from omegaconf import DictConfig

from tbac.app import command, make_part, pick_device

# Precision of training by Lightning's name -> type of its autocast. The others change the weights themselves.
AUTOCAST = {
    **dict.fromkeys(("32-true", "32"), None),
    **dict.fromkeys(("bf16-mixed", "bf16"), "bfloat16"),
    **dict.fromkeys(("16-mixed", "16"), "float16"),
}


@command("cache_prompts")
def main(cfg: DictConfig) -> None:
    # What is wrong with options or shards is said before a weight is read.
    if cfg.prompt_cache.keep is None:
        raise ValueError("prompt_cache.keep must be prompts or images here, got null")
    if cfg.prompt_cache.folder is None:
        raise ValueError("prompt_cache.folder=DIR is needed: memory would be gone when this command ends")
    precision = str(cfg.trainer.precision)
    if precision not in AUTOCAST:
        raise ValueError(f"machine.precision must be one of {', '.join(AUTOCAST)} here, got {precision}")
    if not 0 <= cfg.rank < cfg.world_size:
        raise ValueError(f"rank={cfg.rank} must be at least 0 and below world_size={cfg.world_size}")

    import torch

    from data_prep.shards.prompts import fill_prompt_cache, list_samples
    from tbac.models import UniImage
    from tbac.models.prompt_cache import make_prompt_cache
    from tbac.models.qwen import DTYPES

    device = pick_device("cuda" if cfg.machine.accelerator == "gpu" else cfg.machine.accelerator)
    if device.type == "cuda" and cfg.world_size > 1:  # the processes of a node share its GPUs, one each
        device = torch.device("cuda", cfg.rank % torch.cuda.device_count())
    data, config = make_part(cfg.data, "data"), make_part(cfg.prompt_cache, "prompt_cache")
    samples = list_samples(data)[cfg.rank :: cfg.world_size]
    model = UniImage.from_config(make_part(cfg.model, "model"))
    model.mllm.to(device)
    cache = make_prompt_cache(config, model, precision)
    assert cache is not None
    # As in training, mixed precision means autocast.
    dtype = DTYPES[AUTOCAST[precision] or "float32"]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        filled = fill_prompt_cache(cache, model.mllm, samples, data.dropout)
    print(f"{filled.prompts:,} prompts of {filled.samples:,} samples: {filled.computed:,} weren't kept yet")
    if filled.corrupt:
        print(f"{filled.corrupt:,} samples can't be decoded; training replaces them")
    print(f"the cache now holds {len(cache.store):,} entries, {cache.store.bytes / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()

"""Parameters, memory by kind, FLOPs by part, time, and what fits: the sums behind `plan.py`.

Nothing is read or allocated: the real modules run on tensors without memory. Memory is per device and at its peak.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from experiments.costs import Activations, Case, count_autoencoder_flops, count_sample_flops, measure_activations
from tbac.app import to_plain
from tbac.models import UniImage

GIB = 1024**3
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}  # nf4: a scale per 64
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2.0}
SHARDED = ("fsdp", "fsdp2", "deepspeed_stage_3")


@dataclass(frozen=True)
class Setting:
    """What a run may choose; names as in the configs.

    Attributes:
        optimizer: `adamw` or `adamw8bit`.
        quantization: of the MLLM's layers, or None.
        checkpointing: of denoiser and query pass.
        ema: whether averaged weights are kept.
        strategy: Lightning's name; the `fsdp` ones shard what trains over the devices.
        devices: GPUs in all.
        mixed: bf16 autocast, or float32 throughout.
        cached: latents come from the shards.
    """

    optimizer: str
    quantization: str | None
    checkpointing: bool
    ema: bool
    strategy: str
    devices: int
    mixed: bool
    cached: bool

    @property
    def label(self) -> str:
        sharded = self.strategy if self.strategy in SHARDED else ""
        words = [sharded, self.optimizer, self.quantization or "", "checkpointing" if self.checkpointing else ""]
        return ", ".join([w for w in words if w] + ([] if self.ema else ["no average"]))


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def build_on_meta(model_config: dict[str, Any]) -> UniImage:
    """The model on the meta device."""
    with torch.device("meta"):
        model = UniImage.from_config(instantiate(model_config, random_init=True))
    return model


def count_parts(model: UniImage) -> dict[str, int]:
    """Parameters of every part; tied tables are counted once."""
    mllm = model.mllm.body
    layers = mllm.language_model
    embeddings = count_parameters(layers.embed_tokens)
    return {
        "mllm_layers": count_parameters(layers) - embeddings,
        "mllm_embeddings": embeddings,
        "mllm_vision": count_parameters(mllm.visual),
        "queries": model.ladder.queries.numel(),
        "connector": count_parameters(model.ladder) - model.ladder.queries.numel(),
        "denoiser": count_parameters(model.denoiser),
        "autoencoder": count_parameters(model.autoencoder),
    }


def estimate_memory(model: UniImage, dtype: str, setting: Setting, kept: Activations, batch: int) -> dict[str, float]:
    """Peak bytes on each device, by kind.

    Weights are what training reads: the MLLM up to the deepest tap, the autoencoder's decoder for sample pictures, its
    encoder where latents aren't cached. Gradients and activations are both counted whole, though the one grows while
    the other shrinks; DDP holds gradients a second time in its buckets.
    """
    mllm, size = model.mllm.body, BYTES[dtype]
    deep = mllm.language_model.layers[: model.ladder.plan.deepest]
    linear = sum(count_parameters(m) for layer in deep for m in layer.modules() if isinstance(m, nn.Linear))
    rest = sum(count_parameters(layer) for layer in deep) - linear
    frozen = linear * BYTES[setting.quantization or dtype] + rest * size
    frozen += (count_parameters(mllm.language_model.embed_tokens) + count_parameters(mllm.visual)) * size
    autoencoder = model.autoencoder.model
    frozen += (
        count_parameters(autoencoder.decoder) + (0 if setting.cached else count_parameters(autoencoder.encoder))
    ) * size
    trained = count_parameters(model.ladder) + count_parameters(model.denoiser)
    share = setting.devices if setting.strategy in SHARDED else 1
    copies = kept.fixed / share + (2 * kept.fixed / model.denoiser.num_blocks if share > 1 else 0)
    buckets = 4.0 * trained if setting.strategy.startswith("ddp") and setting.devices > 1 else 0.0
    return {
        "frozen weights": frozen,
        "trained weights": 4.0 * trained / share,
        "their bf16 copies": copies,
        "gradients": 4.0 * trained / share + buckets,
        "optimizer": OPTIMIZER_BYTES[setting.optimizer] * trained / share,
        "averaged weights": 4.0 * trained / share if setting.ema else 0.0,
        "activations": batch * kept.per_sample(setting.checkpointing, setting.checkpointing),
        "prompt cache": batch * kept.cache,
    }


def compute_largest_batch(limit: float, fixed: float, each: float) -> int:
    """Samples that fit into `limit` bytes beside what is there whatever the batch."""
    return max(0, int((limit - fixed) // each))


def report_stage(cfg: DictConfig, model: UniImage) -> dict[str, Any]:
    """Everything about one stage; `cfg` is `conf/plan.yaml` with that stage."""
    options = to_plain(cfg)
    check_options(options)
    model_config, dtype, stage = options["model"], options["model"]["dtype"], options["stage"]
    machine, overhead = options["machine"], options["overhead_gib"] * GIB
    setting = Setting(
        optimizer=read_optimizer_name(options),
        quantization=model_config["quantization"],
        checkpointing=bool(model_config["denoiser_checkpointing"] and model_config["query_checkpointing"]),
        ema=bool(stage["ema_decay"]),
        strategy=str(machine["strategy"]),
        devices=max(1, machine["devices"]) * int(machine["num_nodes"]),
        mixed=machine["precision"] == "bf16-mixed",
        cached=options["cached_latents"],
    )
    side = stage["image_size"] // model.autoencoder.compression
    text = Case("text", options["text_tokens"], 1)
    edit = Case(
        "image + text", options["text_tokens"] + options["image_tokens"] + 2, 1, round(options["image_tokens"] ** 0.5)
    )
    share, k = options["edit_share"][stage["name"]], stage["noise_samples_per_prompt"]
    flops: dict[str, float] = {}
    for case, weight in ((text, 1 - share), (edit, share)):
        if weight:
            for part, value in count_sample_flops(model_config, case, side).items():
                flops[part] = flops.get(part, 0.0) + weight * value * (k if part == "denoiser" else 1)
    flops["autoencoder"] = 0.0 if setting.cached else count_autoencoder_flops(model_config, stage["image_size"])
    total = sum(flops.values())
    rate = options["utilisation"] * options["peak_tflops"] * 1e12 / total
    samples = stage["steps"] * stage["batch_size"] * setting.devices
    kept = measure_activations(model_config, edit if share else text, side, setting.mixed)
    kept = replace(kept, denoiser=k * kept.denoiser, block_inputs=k * kept.block_inputs)
    memory = estimate_memory(model, dtype, setting, kept, stage["batch_size"])
    hours = samples / (rate * setting.devices) / 3600
    choices = [
        setting,
        *(
            replace(setting, optimizer=o, quantization=q, checkpointing=c, ema=e, strategy=strategy)
            for strategy, o, q, c, e in (
                (setting.strategy, "adamw", None, False, True),
                (setting.strategy, "adamw", None, True, True),
                (setting.strategy, "adamw", None, True, False),
                (setting.strategy, "adamw8bit", None, True, False),
                (setting.strategy, "adamw8bit", "nf4", True, False),
                ("fsdp", "adamw", None, False, True),
                ("fsdp", "adamw", "nf4", True, True),
            )
        ),
    ]
    fits = {}
    for choice in dict.fromkeys(choices):
        one, two = (sum(estimate_memory(model, dtype, choice, kept, b).values()) + overhead for b in (0, 1))
        fits[choice.label] = {str(gb): compute_largest_batch(gb * 1e9, one, two - one) for gb in options["memory_gb"]}
    return {
        "stage": stage["name"],
        "setting": {**asdict(setting), "batch": stage["batch_size"], "image_size": stage["image_size"]},
        "flops_per_sample": flops,
        "flops": total,
        "memory_gib": {name: round(value / GIB, 3) for name, value in memory.items()},
        "memory_total_gib": round((sum(memory.values()) + overhead) / GIB, 3),
        "samples_per_s_per_gpu": round(rate, 3),
        "samples_per_s": round(rate * setting.devices, 1),
        "samples": samples,
        "hours": round(hours, 1),
        "gpu_hours": round(hours * setting.devices, 0),
        "largest_batch": fits,
    }


def read_optimizer_name(options: dict[str, Any]) -> str:
    """The optimizer's name, by what its config calls."""
    return str(options["optim"]["_target_"]).rsplit(".", 1)[-1]


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for what the planner can't count."""
    if (name := read_optimizer_name(options)) not in OPTIMIZER_BYTES:
        raise ValueError(f"optim must be one of {', '.join(OPTIMIZER_BYTES)}, got {name!r}")
    if not 0 < options["utilisation"] <= 1:
        raise ValueError(f"utilisation must be above 0 and at most 1, got {options['utilisation']}")
    if options["machine"]["precision"] not in ("bf16-mixed", "32-true"):
        raise ValueError(f"machine.precision must be bf16-mixed or 32-true, got {options['machine']['precision']!r}")
    for name in ("text_tokens", "peak_tflops"):
        if options[name] <= 0:
            raise ValueError(f"{name} must be positive, got {options[name]}")
    if (name := options["stage"]["name"]) not in options["edit_share"]:
        raise ValueError(f"edit_share has no entry for stage {name}")


def plan_run(model_config: DictConfig, stages: Sequence[DictConfig]) -> dict[str, Any]:
    """Parameters, and every stage.

    Args:
        model_config: `model` of `conf/plan.yaml`.
        stages: `conf/plan.yaml` with each stage.
    """
    model = build_on_meta(to_plain(model_config))
    parts = count_parts(model)
    trained = parts["queries"] + parts["connector"] + parts["denoiser"]
    total = count_parameters(model)
    taps = model.ladder.plan
    return {
        "parameters": parts,
        "total": total,
        "trained": trained,
        "frozen": total - trained,
        "taps": taps.list_block_layers() if not taps.mixed else list(taps.layers),
        "stages": [report_stage(stage, model) for stage in stages],
    }

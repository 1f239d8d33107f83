"""Parameters, memory by kind, FLOPs by part, time, and the batches that fit: what `plan.py` computes.

No weights are read and no memory is taken: the real modules run on tensors without data. Memory means the peak of one
device.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from experiments.costs import (
    Activations,
    Case,
    count_autoencoder_flops,
    count_forward_flops,
    count_sample_flops,
    measure_activations,
)
from experiments.kept import SPARED, plan_prompt_cache
from tbac.app import to_plain
from tbac.models import UniImage
from tbac.models.lora import has_adapters, is_trained_beside_adapters

GIB = 1024**3
# Bytes of one weight; nf4 has a float32 scale for every 64 weights.
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2.0}  # two moments of every trained weight
SHARDED = ("fsdp", "fsdp2", "deepspeed_stage_3")  # strategies that divide the trained weights among the devices


@dataclass(frozen=True)
class Setting:
    """The choices of a run that decide how much memory it needs; the names are those of the configs.

    Attributes:
        optimizer: `adamw` or `adamw8bit`.
        quantization: how the MLLM's layers are quantized (`int8`, `nf4`), or None.
        checkpointing: whether the denoiser and the query pass compute their activations again in the backward pass.
        ema: whether averaged weights are kept.
        strategy: Lightning's name; those in `SHARDED` divide the trained weights among the devices.
        devices: GPUs of all nodes together.
        mixed: True for bf16 autocast, False for float32 throughout.
        cached: whether latents come from the shards, so that no encoder is needed.
        accumulating: whether gradients of several batches are added up, so that they stay from one to the next.
        policies: copies of the trained weights that reinforcement keeps besides.
    """

    optimizer: str
    quantization: str | None
    checkpointing: bool
    ema: bool
    strategy: str
    devices: int
    mixed: bool
    cached: bool
    accumulating: bool = False
    policies: int = 0

    @property
    def label(self) -> str:
        """What a table calls this setting, such as `fsdp, adamw, nf4, checkpointing`."""
        words = []
        if self.strategy in SHARDED:
            words.append(self.strategy)
        words.append(self.optimizer)
        if self.quantization:
            words.append(self.quantization)
        if self.checkpointing:
            words.append("checkpointing")
        if not self.ema:
            words.append("no average")
        return ", ".join(words)


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def build_on_meta(model_config: dict[str, Any]) -> UniImage:
    """Build the model on torch's meta device, where tensors have shapes but no data."""
    with torch.device("meta"):
        model = UniImage.from_config(instantiate(model_config, random_init=True))
    return model


def count_parts(model: UniImage) -> dict[str, int]:
    """Count the parameters of every part; a table that input and output embeddings share is counted once."""
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


def count_trained(model: UniImage) -> dict[str, int]:
    """Count the parameters that training changes, of `queries`, `connector` and `denoiser`."""
    parts = count_parts(model)
    adapters = [parameter for name, parameter in model.denoiser.named_parameters() if is_trained_beside_adapters(name)]
    adapted = has_adapters(model.provenance.config)
    denoiser = sum(parameter.numel() for parameter in adapters) if adapted else parts["denoiser"]
    return {"queries": parts["queries"], "connector": parts["connector"], "denoiser": denoiser}


@lru_cache(maxsize=4)
def count_in_use(model: UniImage) -> dict[str, int]:
    """Count the parameters that training reads, by how they are held.

    Returns:
        `linear`: of the MLLM's layers up to the deepest tap, which alone may be quantized; `other`: frozen ones that
        always stay; `encoder`: of the autoencoder, which cached latents make superfluous; `trained`.
    """
    mllm, autoencoder = model.mllm.body, model.autoencoder.model
    deep = mllm.language_model.layers[: model.ladder.plan.deepest]
    linear = sum(count_parameters(m) for layer in deep for m in layer.modules() if isinstance(m, nn.Linear))
    frozen = (*deep, mllm.language_model.embed_tokens, mllm.visual, autoencoder.decoder)
    # Of a denoiser with adapters these alone train, and its own weights are held as the frozen parts are.
    denoiser = count_parameters(model.denoiser)
    base = denoiser - count_trained(model)["denoiser"]
    return {
        "linear": linear,
        "other": sum(map(count_parameters, frozen)) - linear + base,
        "encoder": count_parameters(autoencoder.encoder),
        "trained": count_parameters(model.ladder) + denoiser - base,
    }


def estimate_memory(model: UniImage, dtype: str, setting: Setting, kept: Activations, batch: int) -> dict[str, float]:
    """Estimate the memory of each device at its peak in bytes, by kind.

    The frozen weights are those that training uses: the MLLM up to the deepest tap, the autoencoder's decoder for
    sample pictures, and its encoder where latents aren't cached. The backward pass frees activations while it makes
    gradients, so the peak is at its beginning (all activations) or at its end (all gradients), whichever is more. DDP
    holds the gradients a second time, in its buckets, throughout.

    Args:
        model: on the meta device.
        dtype: of the frozen weights, a key of `BYTES`.
        setting: the choices of the run.
        kept: activations, as `measure_activations` returns them.
        batch: samples on one device.
    """
    counts, size = count_in_use(model), BYTES[dtype]
    frozen = counts["linear"] * BYTES[setting.quantization or dtype] + counts["other"] * size
    if not setting.cached:
        frozen += counts["encoder"] * size
    # What trains is held in float32; a sharding strategy leaves each device its share.
    trained = counts["trained"]
    share = setting.devices if setting.strategy in SHARDED else 1
    # Autocast copies the trained weights; where they are sharded, two whole blocks are gathered at a time.
    copies = kept.fixed / share
    if share > 1:
        copies += 2 * kept.fixed / model.denoiser.num_blocks
    ddp = setting.strategy.startswith("ddp") and setting.devices > 1
    buckets = 4.0 * trained if ddp else 0.0
    gradients = 4.0 * trained / share
    activations = batch * kept.per_sample(setting.checkpointing, setting.checkpointing)
    # Policies that reinforcement compares with; while one acts, every device has all of its weights.
    policies = 4.0 * trained * (setting.policies / share + (1 - 1 / share if setting.policies else 0.0))
    # While a block runs backward, its activations have gradients as large as they are, and so have its copied weights.
    block = batch * max(kept.queries / kept.num_layers, kept.denoiser / kept.num_blocks)
    begin = {
        "their bf16 copies": copies,
        "gradients": buckets + (gradients if setting.accumulating else 0.0),
        "activations": activations + block,
        "prompt cache": batch * kept.cache,
    }
    end = {
        "their bf16 copies": 2 * kept.fixed / model.denoiser.num_blocks,
        "gradients": buckets + gradients,
        "activations": 2 * block,
        "prompt cache": batch * kept.cache,
    }
    return {
        "frozen weights": frozen,
        "trained weights": 4.0 * trained / share,
        "optimizer": OPTIMIZER_BYTES[setting.optimizer] * trained / share,
        "averaged weights": 4.0 * trained / share if setting.ema else 0.0,
        **({"policies": policies} if policies else {}),
        **max(begin, end, key=lambda moment: sum(moment.values())),
    }


def find_largest_batch(limit: float, estimate: Callable[[int], float]) -> int:
    """Find the largest batch, up to a million, that needs at most `limit` bytes by an estimate that grows with it."""
    sizes = range(1, 1_000_001)
    return bisect_right(sizes, limit, key=estimate)


def report_stage(cfg: DictConfig, model: UniImage) -> dict[str, Any]:
    """Report the FLOPs, memory, time and largest batches of one stage.

    Args:
        cfg: `conf/plan.yaml`, composed with that stage.
        model: on the meta device.
    """
    options = to_plain(cfg)
    check_options(options)
    model_config, dtype, stage = options["model"], options["model"]["dtype"], options["stage"]
    setting = read_setting(options)
    # Most of the numbers follow from the two kinds of prompt, and how often the stage sees an input image.
    text = Case("text", options["text_tokens"], 1)
    image_tokens = options["image_tokens"]
    edit = Case("image + text", options["text_tokens"] + image_tokens + 2, 1, round(image_tokens**0.5))
    edit_share = options["edit_share"][stage["name"]]
    # Time follows from the FLOPs of an average sample; what a prompt cache has kept doesn't run again.
    shares = {text: 1 - edit_share, edit: edit_share}
    flops = count_stage_flops(options, shares, model.autoencoder.compression)
    prompt_cache = plan_prompt_cache(model, shares, flops, options)
    for part in SPARED.get(options["prompt_cache"]["keep"], ()):
        flops[part] = 0.0
    total = sum(flops.values())
    rate = options["utilisation"] * options["peak_tflops"] * 1e12 / total
    samples = stage["steps"] * stage["batch_size"] * stage["accumulate"] * setting.devices
    hours = samples / (rate * setting.devices) / 3600
    # Memory must hold the longest prompts; the denoiser runs once for each noise sample of a prompt.
    longest = edit if edit_share else text
    side = stage["image_size"] // model.autoencoder.compression
    kept = measure_activations(model_config, longest, side, setting.mixed)
    noises = stage["noise_samples_per_prompt"]
    if stage["reinforce"]:
        noises *= stage["reinforce"]["drawing"]["group_size"]
    kept = replace(kept, denoiser=noises * kept.denoiser, block_inputs=noises * kept.block_inputs)
    memory = estimate_memory(model, dtype, setting, kept, stage["batch_size"])
    overhead = options["overhead_gib"] * GIB
    # The batches that fit, with this setting and with others that one might try.
    fits = {}
    for choice in list_settings(setting):

        def estimate(batch: int, choice: Setting = choice) -> float:
            return overhead + sum(estimate_memory(model, dtype, choice, kept, batch).values())

        fits[choice.label] = {str(gb): find_largest_batch(gb * 1e9, estimate) for gb in options["memory_gb"]}
    return {
        "stage": stage["name"],
        "setting": {**asdict(setting), "batch": stage["batch_size"], "image_size": stage["image_size"]},
        "flops_per_sample": flops,
        "flops": total,
        "prompt_cache": {keep: spared.to_dict() for keep, spared in prompt_cache.items()},
        "memory_gib": {name: round(value / GIB, 3) for name, value in memory.items()},
        "memory_total_gib": round((sum(memory.values()) + overhead) / GIB, 3),
        "samples_per_s_per_gpu": round(rate, 3),
        "samples_per_s": round(rate * setting.devices, 1),
        "samples": samples,
        "hours": round(hours, 1),
        "gpu_hours": round(hours * setting.devices, 0),
        "largest_batch": fits,
    }


def read_setting(options: dict[str, Any]) -> Setting:
    """Read from a config what decides how much memory a run needs."""
    model_config, machine = options["model"], options["machine"]
    return Setting(
        optimizer=read_optimizer_name(options),
        quantization=model_config["quantization"],
        checkpointing=bool(model_config["denoiser_checkpointing"] and model_config["query_checkpointing"]),
        ema=bool(options["stage"]["ema_decay"]),
        strategy=str(machine["strategy"]),
        devices=max(1, machine["devices"]) * int(machine["num_nodes"]),
        mixed=machine["precision"] == "bf16-mixed",
        cached=options["cached_latents"],
        accumulating=options["stage"]["accumulate"] > 1,
        policies=count_policies(options["stage"]),
    )


def count_policies(stage: dict[str, Any]) -> int:
    """Count the policies that a stage keeps beside the one that trains: the old one, and perhaps a reference."""
    if not stage["reinforce"]:
        return 0
    return 2 if stage["reinforce"]["loss"]["kl_weight"] else 1


def list_settings(setting: Setting) -> list[Setting]:
    """List a setting and others that one would try to need less memory, each once."""
    same = setting.strategy
    others = (
        # strategy, optimizer, quantization, checkpointing, ema
        (same, "adamw", None, False, True),
        (same, "adamw", None, True, True),
        (same, "adamw", None, True, False),
        (same, "adamw8bit", None, True, False),
        (same, "adamw8bit", "nf4", True, False),
        ("fsdp", "adamw", None, False, True),
        ("fsdp", "adamw", "nf4", True, True),
    )
    settings = [setting]
    for strategy, optimizer, quantization, checkpointing, ema in others:
        other = replace(setting, strategy=strategy, optimizer=optimizer, quantization=quantization)
        settings.append(replace(other, checkpointing=checkpointing, ema=ema))
    return list(dict.fromkeys(settings))


def count_stage_flops(options: dict[str, Any], shares: dict[Case, float], compression: int) -> dict[str, float]:
    """Count the FLOPs of an average sample of a stage, by part.

    Args:
        options: `conf/plan.yaml` with that stage.
        shares: kind of prompt -> its share of the samples.
        compression: pixels of a side for one latent.
    """
    model_config, stage = options["model"], options["stage"]
    flops: dict[str, float] = {}
    for case, share in shares.items():
        if not share:
            continue
        counted = dict(count_sample_flops(model_config, case, stage["image_size"] // compression))
        counted["denoiser"] *= stage["noise_samples_per_prompt"]
        if stage["reinforce"]:
            counted = count_group_flops(options, case, counted, compression)
        for part, value in counted.items():
            flops[part] = flops.get(part, 0.0) + share * value
    flops["autoencoder"] = 0.0
    if not options["cached_latents"] and (not stage["reinforce"] or stage["reinforce"]["supervised_weight"]):
        flops["autoencoder"] = count_autoencoder_flops(model_config, stage["image_size"])
    return flops


def count_group_flops(
    options: dict[str, Any], case: Case, supervised: dict[str, float], compression: int
) -> dict[str, float]:
    """Count the FLOPs of a prompt with its group of pictures in a stage of reinforcement, by part.

    All groups are taken to differ in their scores; others cost only what drawing them does. Rewards aren't counted.

    Args:
        options: `conf/plan.yaml` with that stage.
        case: the prompt.
        supervised: FLOPs of the usual step on such a prompt, by part.
        compression: pixels of a side for one latent.
    """
    stage, drawing = options["stage"], options["stage"]["reinforce"]["drawing"]
    size, policies = drawing["group_size"], count_policies(stage)
    forward = count_forward_flops(options["model"], case, stage["image_size"] // compression)
    # The old policy draws; it and the reference predict where the trained one does.
    drawn = forward.prompt + forward.condition
    drawn += size * (forward.projection + drawing["num_inference_steps"] * forward.denoiser + forward.decoder)
    rows = size * stage["noise_samples_per_prompt"]
    compared = policies * (forward.prompt + forward.condition + rows * (forward.projection + forward.denoiser))
    trained = {part: value * (size if part == "denoiser" else 1) for part, value in supervised.items()}
    if stage["reinforce"]["supervised_weight"]:
        trained = {part: value + supervised[part] for part, value in trained.items()}
    return {**trained, "pictures drawn": drawn, "other policies": compared}


def read_optimizer_name(options: dict[str, Any]) -> str:
    """Read the optimizer's name: the function that its config calls, without the module."""
    return str(options["optim"]["_target_"]).rsplit(".", 1)[-1]


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for options that the planner can't count with."""
    optimizer, stage = read_optimizer_name(options), options["stage"]["name"]
    if optimizer not in OPTIMIZER_BYTES:
        raise ValueError(f"optim must be one of {', '.join(OPTIMIZER_BYTES)}, got {optimizer!r}")
    if not 0 < options["utilisation"] <= 1:
        raise ValueError(f"utilisation must be above 0 and at most 1, got {options['utilisation']}")
    if options["machine"]["precision"] not in ("bf16-mixed", "32-true"):
        raise ValueError(f"machine.precision must be bf16-mixed or 32-true, got {options['machine']['precision']!r}")
    for name in ("text_tokens", "peak_tflops"):
        if options[name] <= 0:
            raise ValueError(f"{name} must be positive, got {options[name]}")
    if stage not in options["edit_share"]:
        raise ValueError(f"edit_share has no entry for stage {stage}")


def plan_run(model_config: DictConfig, stages: Sequence[DictConfig]) -> dict[str, Any]:
    """Count the model's parameters, and report every stage.

    Args:
        model_config: `model` of `conf/plan.yaml`.
        stages: `conf/plan.yaml`, composed with each stage.
    """
    model = build_on_meta(to_plain(model_config))
    parts = count_parts(model)
    trained = sum(count_trained(model).values())
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

"""What MLflow shows of a run: the few parameters that an experiment turns, and a name that tells runs apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tbac.models.config import BEHAVIOUR
from tbac.models.taps import TapPlan

OF_A_STAGE = (  # of a stage's config, by their own names
    "steps", "samples", "lr", "min_lr", "warmup_steps", "weight_decay", "clip", "batch_size", "accumulate",
    "noise_samples_per_prompt", "image_size", "ema_decay", "trainable",
)  # fmt: skip


def summarize(configs: Sequence[Mapping[str, Any]], plan: TapPlan) -> dict[str, str]:
    """Choose the parameters that an experiment turns, under short names.

    Args:
        configs: the config of each stage, as plain data; a value that differs between stages is listed for each.
        plan: the resolved taps.

    Returns:
        Name -> value as text: the tap rule and its layers, the ladder, rates, sizes, stage, seed, options.
    """
    first, model = configs[0], configs[0]["model"]
    found: dict[str, Any] = {
        "stage": _join([config["stage"]["name"] for config in configs]),
        "taps": name_part(model.get("taps")),
        "tap_layers": plan.describe(),
        "seed": first.get("seed"),
        "num_queries": model.get("num_queries"),
        "quantization": model.get("quantization"),
        **{name: value for name, value in model.items() if isinstance(value, bool) and name in BEHAVIOUR},
        "optimizer": name_part(first.get("optim")),
        "guard": name_part(first.get("guard")),
        "flow": (first.get("flow") or {}).get("scheme"),
        "precision": (first.get("machine") or {}).get("precision"),
        "devices": _count_devices(first.get("machine") or {}),
    }
    # Of a tap rule, what its layers don't say; of adapters, nothing where there are none.
    taps, lora = model.get("taps") or {}, model.get("lora") or {}
    found |= {name: taps[name] for name in taps if not name.startswith(("_", "layer", "blocks"))}
    if lora.get("rank") is not None:
        found |= {f"lora_{name}": value for name, value in lora.items()}
    found |= {name: Path(str(model[name])).name for name in ("mllm", "denoiser") if model.get(name)}
    found |= {name: model.get(name) for name in ("dtype", "image_pixels")}
    found["prompt_cache"] = (first.get("prompt_cache") or {}).get("keep")
    ladder = model.get("ladder") or {}
    found |= {
        name: value for name, value in ladder.items() if not name.startswith("_") and not isinstance(value, Mapping)
    }
    for name in OF_A_STAGE:
        found[name] = _join([config["stage"].get(name) for config in configs])
    return {name: str(value) for name, value in found.items() if value is not None}


def add_varied(summary: Mapping[str, str], varied: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """Add what a multirun varies and the summary doesn't tell, so that a comparison of its runs shows all of it.

    Args:
        summary: what `summarize` returned.
        varied: key -> value, as given.
        config: of the run; a key that names a group of options adds nothing.
    """
    added = dict(summary)
    for key, value in varied.items():
        place: Any = config
        for part in key.split("."):
            place = place.get(part) if isinstance(place, Mapping) else None
        if place is not None and not isinstance(place, Mapping) and key.split(".")[-1] not in summary:
            added[key] = value
    return added


def name_run(summary: Mapping[str, str], varied: Mapping[str, str]) -> str:
    """Name a run by what tells it from others, such as `last_n lr=0.001 seed=42 t2i_pretrain`.

    Args:
        summary: what `summarize` returned.
        varied: what a multirun varies, key -> value; what the name says anyway isn't repeated.
    """
    words = [
        summary.get("taps", ""),
        f"lr={summary.get('lr')}",
        f"seed={summary.get('seed')}",
        summary.get("stage", ""),
    ]
    shown = {"taps", "stage.lr", "seed", "stage", "stages"}
    words += [f"{key.split('.')[-1].split('@')[0]}={value}" for key, value in varied.items() if key not in shown]
    return " ".join(word for word in words if word)


def name_part(part: Any) -> str | None:
    """Name a part by its class or function, without the module."""
    if isinstance(part, Mapping):
        part = part.get("_target_")
    return str(part).rsplit(".", 1)[-1] if part is not None else None


def _join(values: Sequence[Any]) -> Any:
    """One value where all stages have the same, otherwise that of each."""
    if all(value == values[0] for value in values):
        return values[0]
    return " > ".join(map(str, values))


def _count_devices(machine: Mapping[str, Any]) -> int | None:
    devices, nodes = machine.get("devices"), machine.get("num_nodes", 1)
    return devices * nodes if isinstance(devices, int) and isinstance(nodes, int) else None

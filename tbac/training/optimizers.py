"""Functions that make optimizers and learning-rate schedules, for Hydra to make partials of.

The schedule isn't the one of transformers (`get_cosine_with_min_lr_schedule_with_warmup`), because that one begins the
warm-up with a rate of zero, so that the first step does nothing, and rises again in a run that goes on past its end.
From the end of the warm-up to the end of the run the two are equal, which a test checks.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tbac.distributed import shard_like

MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")  # of AdamW, and of its 8-bit form: as large as the parameter


def make_parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict]:
    """Make two groups for each module: matrices with weight decay; norms, biases, queries and other tables without.

    Modules don't share a group, because one may be sharded over processes and another not.

    Args:
        modules: modules whose trainable parameters are taken.
        weight_decay: weight decay of matrices.
    """
    groups: list[dict] = []
    for module in modules:
        decayed: list[nn.Parameter] = []
        not_decayed: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                table = name.endswith(("queries", "mix_logits", "scale_shift_table"))
                if parameter.ndim < 2 or table:
                    not_decayed.append(parameter)
                else:
                    decayed.append(parameter)
        groups += [{"params": decayed, "weight_decay": weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def list_optimized_names(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[str]:
    """List the names of the parameters that an optimizer updates, in its order."""
    names = {id(p): name for name, p in module.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def collect_named_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, dict[str, Any]]:
    """Collect the optimizer's state of each parameter, by the parameter's name."""
    return {name: optimizer.state[p] for name, p in module.named_parameters() if p in optimizer.state}


def load_named_state(optimizer: torch.optim.Optimizer, module: nn.Module, state: Mapping[str, dict[str, Any]]) -> None:
    """Give a new optimizer the state of an earlier one, for the parameters that both update; its options stay.

    Raises:
        ValueError: for state of a parameter that has another shape here, such as an adapter of another rank.
    """
    for name, parameter in module.named_parameters():
        for moment in MOMENTS:
            kept = state.get(name, {}).get(moment)
            if kept is not None and kept.shape != parameter.shape:
                shapes = f"{tuple(parameter.shape)} here, and {tuple(kept.shape)} in the stage before"
                raise ValueError(
                    f"stage.keep_optimizer=true: {name} has shape {shapes}; keep the model as it was "
                    "(model.lora.rank), or give stage.keep_optimizer=false"
                )
    inherited = {i: state[name] for i, name in enumerate(list_optimized_names(optimizer, module)) if name in state}
    load_state(optimizer, {"state": inherited, "param_groups": optimizer.state_dict()["param_groups"]})


def resume_optimizer(
    optimizer: torch.optim.Optimizer, scheduler: Any, module: nn.Module, checkpoint: Mapping[str, Any]
) -> None:
    """Restore an optimizer's moments and a schedule's position, with the options of now.

    Rates are those of now too. Where the run has lowered a rate itself, it stays lowered by the same factor.

    Args:
        optimizer: new, with the options of now.
        scheduler: its schedule, new.
        module: holds the parameters.
        checkpoint: what the run goes on from.

    Raises:
        ValueError: when other parameters train than when the checkpoint was written.
    """
    facts = checkpoint["tbac"]
    names = list_optimized_names(optimizer, module)
    if names != list(facts["optimized"]):
        other = next(iter(sorted(set(names) ^ set(facts["optimized"]))), "their order")
        raise ValueError(f"the checkpoint's optimizer updates other parameters than stage.trainable says now: {other}")
    saved, schedule = checkpoint["optimizer_states"][0], dict(checkpoint["lr_schedulers"][0])
    asked_before = facts.get("config", {}).get("optim", {}).get("lr")
    groups = []
    for group, kept in zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True):
        asked = group.get("initial_lr", group["lr"])
        began_with = kept.get("initial_lr", kept["lr"])
        base = began_with if asked_before in (None, asked) else asked * (began_with / asked_before)
        groups.append({**group, "lr": kept["lr"] * (base / began_with), "initial_lr": base})
    load_state(optimizer, {**saved, "param_groups": groups})
    schedule |= {"base_lrs": [group["initial_lr"] for group in groups]}
    scheduler.load_state_dict(schedule)
    # The rate of the coming step, by the schedule of now: its length may be another one.
    if isinstance(scheduler, LambdaLR):
        for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)


def load_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's `state_dict` of whole tensors, and shard these as the parameters are sharded here."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {}
    for index, values in state["state"].items():
        sharded[index] = {name: shard_like(parameters[index], value) for name, value in values.items()}
    optimizer.load_state_dict({**state, "state": sharded})


def adamw(
    groups: list[dict], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, fused: bool = True
) -> torch.optim.Optimizer:
    """Make torch's AdamW, fused by default."""
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)


def adamw8bit(
    groups: list[dict], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.Optimizer:
    """Make bitsandbytes' AdamW with 8-bit state."""
    import bitsandbytes  # here, since the import takes seconds and looks for CUDA libraries

    return bitsandbytes.optim.AdamW8bit(groups, lr=lr, betas=tuple(betas), eps=eps)


def warmup_cosine(optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int, min_lr: float) -> LambdaLR:
    """Make a schedule: a linear warm-up to the optimizer's rate, then a cosine down to `min_lr`, where it stays.

    Args:
        optimizer: optimizer whose rates are scaled.
        total_steps: step at which `min_lr` is reached.
        warmup_steps: step at which the optimizer's own rate is reached.
        min_lr: lowest rate after the warm-up, as a learning rate and not as a share.

    Raises:
        ValueError: when the warm-up doesn't fit into the run, or the floor is above the peak.
    """
    peak = optimizer.param_groups[0]["lr"]
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"stage.warmup_steps={warmup_steps} must be between 0 and stage.steps={total_steps}")
    if not 0 <= min_lr <= peak:
        raise ValueError(f"stage.min_lr={min_lr} must be between 0 and stage.lr={peak}")
    return LambdaLR(optimizer, lambda step: compute_warmup_cosine(step, total_steps, warmup_steps, min_lr / peak))


def compute_warmup_cosine(step: int, total_steps: int, warmup_steps: int, floor: float) -> float:
    """Compute the share of the peak rate at `step`, counted from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

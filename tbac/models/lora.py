"""Low-rank adapters of the denoiser (LoRA, Hu et al. 2021, arXiv 2106.09685), by diffusers' and peft's own classes.

A matrix W of the transformer is frozen, and W + alpha / rank * B A is used in its place; A and B train. While a model
trains, its tensors have peft's names (`….to_q.base_layer.weight`, `….to_q.lora_A.default.weight`). Opened for use or
exported, the product is added to W, and nothing tells the model from one that was trained in full.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tbac.models.config import LoraOptions, ModelConfig

if TYPE_CHECKING:
    from diffusers import SanaTransformer2DModel

    from tbac.models.saved import SavedModel

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
BLOCKS = "transformer_blocks."


def is_adapter(name: str) -> bool:
    """Whether a tensor belongs to an adapter, by its name."""
    return name.endswith((DOWN, UP))


def is_trained_beside_adapters(name: str) -> bool:
    """Whether a tensor of a denoiser with adapters trains: adapters do, and the part that reads input images' latents.

    That part isn't the base model's, and starts at zero.
    """
    return is_adapter(name) or "reference_embed." in name


def list_matrices(transformer: nn.Module) -> dict[str, nn.Linear]:
    """List the matrices of a transformer's blocks by their names, such as `transformer_blocks.0.attn1.to_q`."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if name.startswith(BLOCKS) and isinstance(module, nn.Linear)
    }


def check_targets(options: LoraOptions, transformer: nn.Module) -> None:
    """Raise ValueError for a target that no matrix of the transformer's blocks has as the end of its name."""
    matrices = list_matrices(transformer)
    # Their names within a block, such as `attn1.to_q`, and the last part, which all attentions share.
    within = dict.fromkeys(name.split(".", 2)[2] for name in matrices)
    for target in options.targets:
        if not any(name.endswith(f".{target}") for name in matrices):
            raise ValueError(
                f"model.lora.targets: no matrix of the denoiser's blocks is called {target!r}; there are "
                f"{', '.join(within)}, and each may be named by how it ends"
            )


def add_adapters(transformer: "SanaTransformer2DModel", options: LoraOptions, dtype: torch.dtype) -> None:
    """Give a transformer adapters, which at first change nothing, and freeze everything else.

    Args:
        transformer: with its weights, or on the meta device.
        options: which matrices, and of which rank; `check_targets` has passed them.
        dtype: type of the frozen weights; adapters are float32.
    """
    from peft import LoraConfig

    transformer.to(dtype)
    targets = [name for name in list_matrices(transformer) if name.endswith(tuple(f".{t}" for t in options.targets))]
    assert options.rank is not None
    config = LoraConfig(r=options.rank, lora_alpha=options.scale * options.rank, target_modules=targets)  # type: ignore[arg-type]
    transformer.add_adapter(config)
    for name, parameter in transformer.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()


def merge_adapters(state: Mapping[str, Tensor], options: LoraOptions) -> dict[str, Tensor]:
    """Add adapters to the matrices that they belong to: tensors with peft's names -> tensors with the usual ones.

    The sum is computed in float32 and has the type of the matrix.
    """
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if is_adapter(name):
            continue
        usual = name.replace(BASE, ".")
        down, up = name.replace(f"{BASE}weight", DOWN), name.replace(f"{BASE}weight", UP)
        if down in state and down != name:
            change = options.scale * (state[up].float() @ state[down].float())
            tensor = (tensor.float() + change).to(tensor.dtype)
        merged[usual] = tensor
    return merged


def place_in_adapted(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors with the usual names those of a model with adapters, which keeps its own adapters.

    Args:
        state: tensors with the usual names.
        own: the model's tensors.

    Returns:
        What can be loaded into the model; a tensor that `state` lacks is missing, and one too many is there.
    """
    placed = {name: tensor for name, tensor in own.items() if is_adapter(name)}
    names = {name.replace(BASE, "."): name for name in own if not is_adapter(name)}
    return placed | {names.get(name, name): tensor for name, tensor in state.items()}


def has_adapters(config: ModelConfig) -> bool:
    """Whether the denoiser of a model with these options trains by adapters."""
    return config.lora.rank is not None


def fit_saved(saved: "SavedModel", config: ModelConfig, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a saved model as a model with these options takes them.

    The same adapters are kept as they are; others become part of the matrices.

    Args:
        saved: the model that is loaded.
        config: options of the model that takes its tensors.
        own: that model's tensors.
    """
    if saved.config.lora == config.lora:
        return dict(saved.state)
    return place_in_adapted(merge_saved(saved).state, own)


def merge_saved(saved: "SavedModel") -> "SavedModel":
    """Return a saved model whose adapters are part of its matrices; one without adapters is returned as it is."""
    if not has_adapters(saved.config):
        return saved
    config = replace(saved.config, lora=LoraOptions())
    return replace(saved, config=config, state=merge_adapters(saved.state, saved.config.lora))


def extract_adapters(state: Mapping[str, Tensor], prefix: str = "denoiser.transformer.") -> dict[str, Tensor]:
    """Extract the adapters by the names that diffusers reads them with, such as `….to_q.lora_A.weight`."""
    adapters = {name: tensor for name, tensor in state.items() if is_adapter(name) and name.startswith(prefix)}
    return {name.removeprefix(prefix).replace(".default", ""): tensor for name, tensor in adapters.items()}


def write_adapters(saved: "SavedModel", folder: str | Path) -> None:
    """Write the adapters alone, as `pytorch_lora_weights.safetensors`, which diffusers' SANA pipelines load.

    They belong to the denoiser that their training began with.

    Raises:
        ValueError: for a model without adapters.
    """
    from diffusers.loaders import SanaLoraLoaderMixin

    lora = saved.config.lora
    adapters = extract_adapters(saved.state)
    if not has_adapters(saved.config):
        raise ValueError(f"{saved.origin} has no adapters: it was trained without model.lora.rank")
    matrices = sorted({name.split(".lora_")[0] for name in adapters})
    assert lora.rank is not None
    metadata = {"r": lora.rank, "lora_alpha": lora.scale * lora.rank, "target_modules": matrices}
    SanaLoraLoaderMixin.save_lora_weights(
        folder, transformer_lora_layers=adapters, transformer_lora_adapter_metadata=metadata
    )

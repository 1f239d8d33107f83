"""What one training step costs in FLOPs and activations, counted while it runs on tensors without data."""

import functools
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from tbac.flow import compute_velocity_loss, interpolate
from tbac.models import UniImage
from tbac.models.config import LoraOptions
from tbac.models.lora import list_matrices
from tbac.models.prompt import PromptInputs
from tbac.models.qwen import DTYPES
from tbac.types import Condition

Result = TypeVar("Result")


def once_per_config(count: Callable[..., Result]) -> Callable[..., Result]:
    """Let a function of a model's config, as plain values, compute each result once: stages ask for the same again."""
    results: dict[Any, Result] = {}

    @functools.wraps(count)
    def look_up(model_config: dict[str, Any], *arguments: Any, **options: Any) -> Result:
        text = json.dumps(model_config, sort_keys=True, default=str)
        key = text, arguments, tuple(sorted(options.items()))
        if key not in results:
            results[key] = count(model_config, *arguments, **options)
        return results[key]

    return look_up


@dataclass(frozen=True)
class Case:
    """One kind of prompt.

    Attributes:
        name: `text` or `image + text`.
        tokens: length of the prompt, image tokens included.
        batch: number of prompts.
        side: image tokens along one side of the input image; 0 if there is no image.
    """

    name: str
    tokens: int
    batch: int
    side: int = 0


def make_inputs(model: UniImage, case: Case, shared: int, seed: int = 0, device: str | None = None) -> PromptInputs:
    """Make random prompts of equal length.

    Args:
        model: that will read them.
        case: how many prompts of which length, and the size of their image.
        shared: how many tokens all prompts begin with in common.
        seed: of tokens and pixels.
        device: the model's if None.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.mllm.model.config
    vocabulary = min(config.text_config.vocab_size, config.image_token_id) - 8
    # Ordinary tokens only: the special ones are the last of the vocabulary.
    ids = torch.randint(0, vocabulary, (case.batch, case.tokens), generator=generator)
    ids[:, :shared] = ids[:1, :shared].clone()
    data: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "shared_ids": ids[0, :shared].clone()}
    positions = torch.arange(case.tokens).expand(3, case.batch, -1)
    # An image takes the place of the tokens after the shared ones, and gives its tokens positions in two dimensions.
    side = case.side
    if side:
        ids[:, shared] = config.vision_start_token_id
        ids[:, shared + 1 : shared + 1 + side**2] = config.image_token_id
        vision = config.vision_config
        merge = vision.spatial_merge_size
        grids = torch.tensor([[1, side * merge, side * merge]] * case.batch)
        channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        data["pixel_values"] = torch.randn(int(grids.prod(-1).sum()), channels, generator=generator)
        data["image_grid_thw"] = grids
        kinds = (ids == config.image_token_id).int()
        positions = model.mllm.body.get_rope_index(ids, kinds, grids, attention_mask=data["attention_mask"])[0]
    return PromptInputs({"input_ids": ids, "position_ids": positions, **data}).to(device or model.device)


@once_per_config
def count_sample_flops(model_config: dict[str, Any], case: Case, latent_side: int) -> dict[str, float]:
    """Count the FLOPs of one training sample by part, with the backward passes; a multiply-add is two FLOPs.

    Nothing is checkpointed. What it takes to encode target images is counted by `count_autoencoder_flops`.

    Args:
        model_config: one of `conf/model/*.yaml`, resolved.
        case: the prompt; its batch size is ignored.
        latent_side: side of the latents.

    Returns:
        `vision`, `prefix`, `queries`, `ladder`, `denoiser`, and `reference` where the denoiser reads the latents of
        the input image.
    """
    with torch.device("meta"):
        model = UniImage.from_config(instantiate(model_config, random_init=True, dtype="float32"))
    case = replace(case, batch=1)
    inputs = make_inputs(model, case, 0)
    plan = model.ladder.plan
    counted: dict[str, float] = {}

    def count(name: str, work: Callable[[], Any]) -> Any:
        """Do some work, and add its FLOPs to those of a part."""
        with _make_flop_counter() as counter:
            result = work()
        counted[name] = counted.get(name, 0.0) + float(counter.get_total_flops())
        return result

    # The vision tower is counted apart; the prefix pass then runs without pixels.
    counted["vision"] = 0.0
    if case.side:
        with torch.no_grad():
            count("vision", lambda: model.mllm.encode_images(inputs["pixel_values"], inputs["image_grid_thw"]))
        inputs = PromptInputs({k: v for k, v in inputs.items() if k not in ("pixel_values", "image_grid_thw")})
    prefix = count("prefix", lambda: model.mllm.read_prefix(inputs, plan.deepest, model.ladder.prompt_layers))
    taps = count("queries", lambda: model.mllm.read_queries(model.ladder.queries, prefix, plan.layers))
    # Each part reads a detached copy of what the part before made, so that its backward pass can be counted alone.
    both = taps.detach() if prefix.states is None else torch.cat([taps.detach(), prefix.states], dim=2)
    tapped = both.requires_grad_()
    states = count("ladder", lambda: model.ladder(tapped))
    read = states.detach().requires_grad_()
    # The denoiser, with the loss of one noise sample.
    latents, noise = (torch.randn(1, model.latent_channels, latent_side, latent_side, device="meta") for _ in range(2))
    path = interpolate(latents, noise, torch.rand(1, device="meta"))
    reference = None
    if model.denoiser.reference_embed is not None:
        reference = latents
        if case.side:
            counted["reference"] = count_autoencoder_flops(model_config, latent_side * model.autoencoder.compression)
    condition = Condition(read, None, reference)
    predicted = count("denoiser", lambda: model.predict_velocity(path.noisy, path.sigma, condition))
    # The backward passes, from the loss down; the states of the prompt's own tokens pass no gradient to the MLLM.
    count("denoiser", lambda: compute_velocity_loss(predicted, path.velocity).backward())
    count("ladder", lambda: states.backward(read.grad))
    assert tapped.grad is not None
    query_gradient = tapped.grad[:, :, : taps.shape[2]]
    count("queries", lambda: taps.backward(query_gradient))
    return counted


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of passes without gradient, of one sample.

    Attributes:
        prompt: of vision tower and prompt.
        condition: of queries and ladder.
        projection: of what the denoiser computes once of its contexts: keys and values of all blocks.
        denoiser: of the rest of the denoiser.
        decoder: of the autoencoder's decoder.
    """

    prompt: float
    condition: float
    projection: float
    denoiser: float
    decoder: float


@once_per_config
def count_forward_flops(model_config: dict[str, Any], case: Case, latent_side: int) -> ForwardFlops:
    """Count the FLOPs of passes without gradient, as drawing pictures needs them.

    Args:
        model_config: one of `conf/model/*.yaml`, resolved.
        case: the prompt; its batch size is ignored.
        latent_side: side of the latents.
    """
    with torch.device("meta"):
        model = UniImage.from_config(instantiate(model_config, random_init=True, dtype="float32")).requires_grad_(False)
    inputs = make_inputs(model, replace(case, batch=1), 0)
    latents = torch.randn(1, model.latent_channels, latent_side, latent_side, device="meta")
    plan = model.ladder.plan
    found = []
    with torch.no_grad():
        with _make_flop_counter() as counter:
            prefix = model.mllm.read_prefix(inputs, plan.deepest, model.ladder.prompt_layers)
        found.append(counter.get_total_flops())
        with _make_flop_counter() as counter:
            taps = model.mllm.read_queries(model.ladder.queries, prefix, plan.layers)
            both = taps if prefix.states is None else torch.cat([taps, prefix.states], dim=2)
            condition = Condition(model.ladder(both), None, latents if model.denoiser.reference_embed else None)
        found.append(counter.get_total_flops())
        with _make_flop_counter() as counter:
            projected = model.denoiser.project(condition)
        found.append(counter.get_total_flops())
        with _make_flop_counter() as counter:
            model.predict_velocity(latents, torch.rand(1, device="meta"), projected)
        found.append(counter.get_total_flops())
        with _make_flop_counter() as counter:
            model.autoencoder.model.decoder(latents)
        found.append(counter.get_total_flops())
    return ForwardFlops(*map(float, found))


@once_per_config
def count_autoencoder_flops(model_config: dict[str, Any], image_size: int) -> float:
    """Count the FLOPs of encoding one target image of `image_size` pixels a side."""
    with torch.device("meta"):
        model = UniImage.from_config(instantiate(model_config, random_init=True, dtype="float32"))
        pixels = torch.randn(1, 3, image_size, image_size)
    with _make_flop_counter() as counter, torch.no_grad():
        model.autoencoder.model.encoder(pixels)
    return float(counter.get_total_flops())


def _count_convolution(out_shape: list[int], w_shape: list[int]) -> int:
    """Count the FLOPs of a convolution, grouped or not."""
    return 2 * math.prod(out_shape) * math.prod(w_shape[1:])


def _count_convolution_backward(
    grad_out_shape: list[int], x_shape: list[int], w_shape: list[int], *rest: Any, **_: Any
) -> int:
    """Count the FLOPs of a convolution's backward pass, which torch counts as if a depthwise one were dense."""
    output_mask = rest[-1]  # whether gradients of input, weight and bias are wanted
    return _count_convolution(grad_out_shape, w_shape) * sum(bool(wanted) for wanted in output_mask[:2])


def _make_flop_counter() -> FlopCounterMode:
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _count_convolution_backward}
    )


@dataclass(frozen=True)
class Activations:
    """Bytes that a step keeps for its backward pass; all but `fixed` are per sample.

    Attributes:
        fixed: the copies of weights that autocast makes, which don't depend on the batch.
        queries: activations of the MLLM's query pass and of the ladder, without checkpointing.
        denoiser: activations of the denoiser, without checkpointing.
        query_inputs: what the checkpointed query pass keeps: the inputs of its layers.
        block_inputs: what the checkpointed denoiser keeps: the inputs of its blocks.
        cache: keys and values of the prompt.
        num_layers: layers of the query pass; a checkpointed pass holds the activations of one at a time.
        num_blocks: blocks of the denoiser; a checkpointed pass holds the activations of one at a time.
    """

    fixed: float
    queries: float
    denoiser: float
    query_inputs: float
    block_inputs: float
    cache: float
    num_layers: int
    num_blocks: int

    def per_sample(self, rerun_denoiser: bool, rerun_queries: bool) -> float:
        """Bytes of activations per sample, without the cache.

        Args:
            rerun_denoiser: whether the denoiser is checkpointed.
            rerun_queries: whether the query pass is checkpointed.
        """
        queries, denoiser = self.queries, self.denoiser
        if rerun_queries:
            queries = self.query_inputs + self.queries / self.num_layers
        if rerun_denoiser:
            denoiser = self.block_inputs + self.denoiser / self.num_blocks
        return queries + denoiser


class AdaptedLinear(nn.Module):
    """A frozen matrix with an adapter beside it, which keeps the activations that peft's keeps.

    Args:
        base: the matrix.
        rank: of the adapter.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )

    def forward(self, states: Tensor) -> Tensor:
        """Apply both."""
        result: Tensor = self.base_layer(states)
        return result + self.up(self.down(states.to(self.down.weight.dtype)))


def adapt_denoiser(transformer: nn.Module, options: LoraOptions, dtype: torch.dtype) -> None:
    """Freeze a transformer, and give the matrices that the options name adapters.

    Args:
        transformer: on fake tensors.
        options: with a rank.
        dtype: of the frozen weights.
    """
    assert options.rank is not None
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    transformer.requires_grad_(False)
    endings = tuple(f".{target}" for target in options.targets)
    for name, matrix in list_matrices(transformer).items():
        if name.endswith(endings):
            transformer.set_submodule(name, AdaptedLinear(matrix, options.rank))


@once_per_config
def measure_activations(model_config: dict[str, Any], case: Case, latent_side: int, mixed: bool) -> Activations:
    """Measure the bytes that are kept for the backward pass, on torch's fake tensors.

    Args:
        model_config: one of `conf/model/*.yaml`, resolved.
        case: the prompt; its batch size is ignored.
        latent_side: side of the latents.
        mixed: True for bf16 autocast, False for float32 throughout.
    """
    # Two batch sizes: the difference is what one sample keeps, the rest is kept at any batch size.
    dtype = "bfloat16" if mixed else "float32"
    saved = {}
    # peft can't put adapters into a model on fake tensors, so they are put in here.
    lora = LoraOptions.from_dict(model_config["lora"])
    options = {**model_config, "lora": LoraOptions().to_dict()}
    for batch in (2, 3):
        with FakeTensorMode():
            model = UniImage.from_config(instantiate(options, random_init=True, dtype=dtype, compile=False))
            if lora.rank is not None:
                adapt_denoiser(model.denoiser.transformer, lora, DTYPES[dtype])
            model.set_checkpointing(denoiser=False, queries=False)  # that is left to `Activations.per_sample`
            saved[batch] = _measure_saved_bytes(model, replace(case, batch=batch), latent_side, mixed)
    two, three = saved[2], saved[3]
    each = {name: three[name] - two[name] for name in two}
    # What checkpointing keeps follows from the shapes: (layer, query, hidden) and (block, patch, channel).
    plan, count = model.ladder.plan, model.ladder.queries.shape[0]
    size = 2 if mixed else 4
    width = model.denoiser.transformer.config.num_attention_heads * model.denoiser.transformer.config.attention_head_dim
    patches = (latent_side // model.denoiser.transformer.config.patch_size) ** 2
    # The cache holds keys and values of the prompt, for the layers up to the deepest tap.
    text = model.mllm.model.config.text_config
    heads = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    return Activations(
        fixed=sum(two[name] - 2 * each[name] for name in two),
        queries=each["queries"],
        denoiser=each["denoiser"],
        query_inputs=float(plan.deepest * count * text.hidden_size * size),
        block_inputs=float(model.denoiser.num_blocks * patches * width * size),
        cache=float(plan.deepest * case.tokens * heads * 2 * size),
        num_layers=plan.deepest,
        num_blocks=model.denoiser.num_blocks,
    )


def _measure_saved_bytes(model: UniImage, case: Case, latent_side: int, mixed: bool) -> dict[str, float]:
    """Measure what the forward pass saves for the backward pass, in bytes.

    Returns:
        `queries`: by the query pass and the ladder; `denoiser`: by the denoiser.
    """
    # Weights are there anyway, so saving one costs nothing; and every other tensor counts once.
    counted = {t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    totals = {"queries": 0.0, "denoiser": 0.0}
    part = "queries"

    def keep(tensor: Tensor) -> Tensor:
        """Count a tensor as autograd saves it."""
        storage = tensor.untyped_storage()
        if storage not in counted:
            counted.add(storage)
            totals[part] += storage.nbytes()
        return tensor

    inputs = PromptInputs(
        {
            "input_ids": torch.zeros(case.batch, case.tokens, dtype=torch.long),
            "attention_mask": torch.ones(case.batch, case.tokens, dtype=torch.long),
            "position_ids": torch.zeros(3, case.batch, case.tokens, dtype=torch.long),
        }
    )
    # The step as training takes it. The cache is left out here, because `Activations` counts it apart.
    precision = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()
    with precision, saved_tensors_hooks(keep, lambda tensor: tensor):
        prefix = model.mllm.read_prefix(inputs, model.ladder.plan.deepest)
        counted.update(t.untyped_storage() for t in (*prefix.keys, *prefix.values))
        taps = model.mllm.read_queries(model.ladder.queries, prefix, model.ladder.plan.layers)
        condition = Condition(model.ladder(taps))
        part = "denoiser"
        latents = torch.zeros(case.batch, model.latent_channels, latent_side, latent_side)
        predicted = model.predict_velocity(latents, torch.zeros(case.batch), condition)
        compute_velocity_loss(predicted, latents)
    return totals

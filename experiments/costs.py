"""What one training step costs, found by running it on tensors without memory: FLOPs and activations."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from tbac.flow import compute_velocity_loss, interpolate
from tbac.models import UniImage
from tbac.models.prompt import PromptInputs
from tbac.types import Condition


@dataclass(frozen=True)
class Case:
    """One kind of prompt.

    Attributes:
        name: `text` or `image + text`.
        tokens: of the prompt, image tokens included.
        batch: prompts.
        side: merged patches along a side of the input image, 0 without one.
    """

    name: str
    tokens: int
    batch: int
    side: int = 0


def make_inputs(model: UniImage, case: Case, shared: int, seed: int = 0, device: str | None = None) -> PromptInputs:
    """Random prompts of one length; their first `shared` tokens are the same. On the model's device by default."""
    generator = torch.Generator().manual_seed(seed)
    config = model.mllm.model.config
    vocabulary = min(config.text_config.vocab_size, config.image_token_id) - 8
    ids = torch.randint(0, vocabulary, (case.batch, case.tokens), generator=generator)
    ids[:, :shared] = ids[:1, :shared].clone()
    data: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "shared_ids": ids[0, :shared].clone()}
    positions = torch.arange(case.tokens).expand(3, case.batch, -1)
    if side := case.side:
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


def count_sample_flops(model_config: dict[str, Any], case: Case, latent_side: int) -> dict[str, float]:
    """FLOPs of one training sample by part, a multiply-add being two; backward passes included, nothing checkpointed.

    Args:
        model_config: of `conf/model/*.yaml`, resolved.
        case: the prompt; its batch doesn't matter.
        latent_side: of the latents.

    Returns:
        `vision`, `prefix`, `queries`, `ladder`, `denoiser`, and `reference` where the input image's latents are read;
        what encodes target images online is `count_autoencoder_flops`.
    """
    with torch.device("meta"):
        model = UniImage.from_config(instantiate(model_config, random_init=True, dtype="float32"))
    case = replace(case, batch=1)
    inputs = make_inputs(model, case, 0)
    plan = model.ladder.plan
    counted: dict[str, float] = {}

    def count(name: str, work: Callable[[], Any]) -> Any:
        with _make_flop_counter() as counter:
            made = work()
        counted[name] = counted.get(name, 0.0) + float(counter.get_total_flops())
        return made

    counted["vision"] = 0.0
    if case.side:
        with torch.no_grad():
            count("vision", lambda: model.mllm.encode_images(inputs["pixel_values"], inputs["image_grid_thw"]))
        inputs = PromptInputs({k: v for k, v in inputs.items() if k not in ("pixel_values", "image_grid_thw")})
    prefix = count("prefix", lambda: model.mllm.read_prefix(inputs, plan.deepest, model.ladder.prompt_layers))
    taps = count("queries", lambda: model.mllm.read_queries(model.ladder.queries, prefix, plan.layers))
    both = taps.detach() if prefix.states is None else torch.cat([taps.detach(), prefix.states], dim=2)
    tapped = both.requires_grad_()
    states = count("ladder", lambda: model.ladder(tapped))
    read = states.detach().requires_grad_()
    latents, noise = (torch.randn(1, model.latent_channels, latent_side, latent_side, device="meta") for _ in range(2))
    path = interpolate(latents, noise, torch.rand(1, device="meta"))
    reference = None
    if model.denoiser.reference_embed is not None:
        reference = latents
        if case.side:
            counted["reference"] = count_autoencoder_flops(model_config, latent_side * model.autoencoder.compression)
    condition = Condition(read, None, reference)
    predicted = count("denoiser", lambda: model.predict_velocity(path.noisy, path.sigma, condition))
    count("denoiser", lambda: compute_velocity_loss(predicted, path.velocity).backward())
    count("ladder", lambda: states.backward(read.grad))
    assert tapped.grad is not None
    of_queries = tapped.grad[:, :, : taps.shape[2]]
    count("queries", lambda: taps.backward(of_queries))
    return counted


def count_autoencoder_flops(model_config: dict[str, Any], image_size: int) -> float:
    """FLOPs of encoding one target image of `image_size` pixels a side."""
    with torch.device("meta"):
        model = UniImage.from_config(instantiate(model_config, random_init=True, dtype="float32"))
        pixels = torch.randn(1, 3, image_size, image_size)
    with _make_flop_counter() as counter, torch.no_grad():
        model.autoencoder.model.encoder(pixels)
    return float(counter.get_total_flops())


def _count_convolution(out_shape: list[int], w_shape: list[int]) -> int:
    """FLOPs of a convolution, grouped or not."""
    return 2 * math.prod(out_shape) * math.prod(w_shape[1:])


def _count_convolution_backward(
    grad_out_shape: list[int], x_shape: list[int], w_shape: list[int], *rest: Any, **_: Any
) -> int:
    """FLOPs of its backward pass; the library's own count takes a depthwise convolution for a dense one."""
    output_mask = rest[-1]
    return _count_convolution(grad_out_shape, w_shape) * sum(bool(wanted) for wanted in output_mask[:2])


def _make_flop_counter() -> FlopCounterMode:
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _count_convolution_backward}
    )


@dataclass(frozen=True)
class Activations:
    """Bytes that a step keeps for its backward pass.

    Attributes:
        fixed: whatever the batch: copies of weights that autocast makes.
        queries: per sample, of the MLLM's query pass and the ladder.
        denoiser: per sample.
        query_inputs: per sample, of the query pass when it is checkpointed: the inputs of its layers.
        block_inputs: per sample, of the denoiser when it is checkpointed.
        cache: per sample, keys and values of the prompt.
        num_layers: layers of the query pass, of which a checkpointed pass keeps one's activations at a time.
        num_blocks: the denoiser's.
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
        """Bytes of activations per sample; the cache is apart."""
        queries = self.query_inputs + self.queries / self.num_layers if rerun_queries else self.queries
        denoiser = self.block_inputs + self.denoiser / self.num_blocks if rerun_denoiser else self.denoiser
        return queries + denoiser


def measure_activations(model_config: dict[str, Any], case: Case, latent_side: int, mixed: bool) -> Activations:
    """Bytes kept for the backward pass, measured on fake tensors with autocast as in training.

    Args:
        model_config: of `conf/model/*.yaml`, resolved.
        case: the prompt; its batch doesn't matter.
        latent_side: of the latents.
        mixed: bf16 autocast; otherwise float32 throughout.
    """
    found = {}
    for batch in (2, 3):
        with FakeTensorMode():
            model = UniImage.from_config(
                instantiate(model_config, random_init=True, dtype="bfloat16" if mixed else "float32", compile=False)
            )
            found[batch] = _measure_saved_bytes(model, replace(case, batch=batch), latent_side, mixed)
    two, three = found[2], found[3]
    each = {name: three[name] - two[name] for name in two}
    plan, count = model.ladder.plan, model.ladder.queries.shape[0]
    size = 2 if mixed else 4
    width = model.denoiser.transformer.config.num_attention_heads * model.denoiser.transformer.config.attention_head_dim
    patches = (latent_side // model.denoiser.transformer.config.patch_size) ** 2
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
    """Bytes saved for backward by query pass with ladder, and by the denoiser."""
    counted = {t.untyped_storage() for t in (*model.parameters(), *model.buffers())}  # of the model: not saved anew
    totals = {"queries": 0.0, "denoiser": 0.0}
    part = "queries"

    def keep(tensor: Tensor) -> Tensor:
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

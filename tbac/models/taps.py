"""Tap rules: which MLLM states feed which denoiser block.

A tap is an index into Hugging Face's `hidden_states`: 0 = embeddings, k = output of decoder layer k; the last one is
after the final norm. A rule is a function of (number of MLLM layers, number of denoiser blocks) that returns a
`TapPlan` or says what doesn't fit; its further arguments are its own options. A YAML in conf/taps/ names a rule by
`_target_` (with `_partial_: true`), so a rule of your own may live in any module.

Every rule has one option more, `blocks`: the denoiser's blocks that the rule is for. The rule is then called with their
number, and the other blocks read the final state.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from tbac.models.tap_plan import TapPlan, check_range, is_index

__all__ = [
    "TapPlan", "TapRule", "attend", "bundle", "check_call", "explicit", "final", "first", "last_n", "last_n_reversed",
    "learned_mix", "middle", "resolve_taps", "single", "uniform",
]  # fmt: skip
EVERY_LAYER = "all"  # candidates of a mix: all layers and the final state
LISTS = ("layers", "assignment", "blocks")  # options of rules that are lists
TapRule = Callable[[int, int], TapPlan]  # (num_layers, num_blocks)


def resolve_taps(rule: TapRule | TapPlan, num_layers: int, num_blocks: int) -> TapPlan:
    """Apply a tap rule to a model's sizes, or check that a plan fits them.

    Args:
        rule: one of this module's rules, your own, or a plan.
        num_layers: decoder layers of the MLLM; taps run from 0 to `num_layers`.
        num_blocks: transformer blocks of the denoiser.

    Raises:
        ValueError: for options that the rule doesn't have, a tap out of range, or counts that don't fit.
    """
    plan = rule if isinstance(rule, TapPlan) else _apply_rule(rule, num_layers, num_blocks)
    check_range(plan.layers, num_layers)
    if plan.num_blocks != num_blocks:
        raise ValueError(f"the taps are for {plan.num_blocks} denoiser blocks, and this denoiser has {num_blocks}")
    return plan


def _apply_rule(rule: TapRule, num_layers: int, num_blocks: int) -> TapPlan:
    """Call a rule, for all blocks or for those that its option `blocks` names.

    Raises:
        ValueError: for options that the rule doesn't have, blocks that don't exist, and a rule that fails.
    """
    # One number where a list belongs is a list of one.
    if isinstance(rule, partial):
        single = {name: [value] for name, value in rule.keywords.items() if name in LISTS and is_index(value)}
        rule = partial(rule.func, *rule.args, **{**rule.keywords, **single})
    # `blocks` is taken from the rule's options, unless the rule has an option of its own with this name.
    blocks = None
    if (
        isinstance(rule, partial)
        and "blocks" in rule.keywords
        and "blocks" not in inspect.signature(rule.func).parameters
    ):
        options = dict(rule.keywords)
        blocks = options.pop("blocks")
        rule = partial(rule.func, *rule.args, **options)
    if blocks is not None:
        blocks = check_blocks(blocks, num_blocks)
    count = num_blocks if blocks is None else len(blocks)
    check_call("the tap rule", rule, num_layers, count)
    try:
        plan = rule(num_layers, count)
    except (TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"the tap rule {name_rule(rule)} failed for {num_layers} layers and {count} blocks with "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(plan, TapPlan):
        raise ValueError(f"a tap rule must return a TapPlan, got {plan!r}")
    if blocks is None:
        return plan
    if plan.num_blocks != count:
        raise ValueError(f"the taps are for {plan.num_blocks} denoiser blocks, and taps.blocks names {count}")
    return plan.place(blocks, num_blocks, num_layers)


def check_blocks(blocks: Any, num_blocks: int) -> tuple[int, ...]:
    """Check which blocks a rule is for; one number is a list of one.

    Raises:
        ValueError: unless they are distinct and the denoiser has them.
    """
    listed = [blocks] if is_index(blocks) else blocks
    right = isinstance(listed, list | tuple) and len(listed) > 0
    right = right and all(is_index(block) and block < num_blocks for block in listed)
    if not right or len(set(listed)) != len(listed):
        raise ValueError(
            f"taps.blocks must list different blocks of the denoiser, from 0 to {num_blocks - 1}, or be null for all; "
            f"got {blocks!r}"
        )
    return tuple(listed)


def check_call(what: str, made_of: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Raise ValueError unless a callable takes these arguments, beside the options that a YAML has bound to it."""
    function = made_of
    if isinstance(made_of, partial):
        function, options = made_of.func, {**made_of.keywords, **options}
    try:
        inspect.signature(function).bind(*arguments, **options)
    except TypeError as error:
        name = getattr(function, "__name__", repr(function))
        raise ValueError(f"{what} {name} can't be called with what it is given: {error}") from None


def name_rule(rule: TapRule) -> str:
    """Name a rule by its function and options, without addresses in memory."""
    if not isinstance(rule, partial):
        return getattr(rule, "__qualname__", type(rule).__name__)
    options = ", ".join(f"{name}={value!r}" for name, value in rule.keywords.items())
    return f"{name_rule(rule.func)}({options})"


def count_inner_states(rule: str, num_layers: int, num_blocks: int) -> int:
    """Count the states between the embeddings and the final one.

    Raises:
        ValueError: when there are fewer of them than denoiser blocks.
    """
    inner = num_layers - 1
    if num_blocks > inner:
        raise ValueError(
            f"taps={rule} needs {num_blocks} taps, one per denoiser block, but the MLLM has {inner} states between "
            "its embeddings and its final state; use taps=explicit with taps.assignment"
        )
    return inner


def last_n(num_layers: int, num_blocks: int) -> TapPlan:
    """Tap the states before the last one, ascending, as released: `hidden_states[-(num_blocks + 1):-1]`."""
    count_inner_states("last_n", num_layers, num_blocks)
    return TapPlan.per_block(range(num_layers - num_blocks, num_layers))


def last_n_reversed(num_layers: int, num_blocks: int) -> TapPlan:
    """Tap the states of `last_n`, from deep to shallow."""
    return TapPlan.per_block(last_n(num_layers, num_blocks).layers[::-1])


def first(num_layers: int, num_blocks: int) -> TapPlan:
    """Tap layers 1 to `num_blocks`."""
    count_inner_states("first", num_layers, num_blocks)
    return TapPlan.per_block(range(1, num_blocks + 1))


def middle(num_layers: int, num_blocks: int) -> TapPlan:
    """Tap `num_blocks` layers around the middle."""
    inner = count_inner_states("middle", num_layers, num_blocks)
    start = 1 + (inner - num_blocks) // 2
    return TapPlan.per_block(range(start, start + num_blocks))


def uniform(num_layers: int, num_blocks: int) -> TapPlan:
    """Tap layers that are evenly spread from the first to the one before the last."""
    inner = count_inner_states("uniform", num_layers, num_blocks)
    if num_blocks == 1:
        return TapPlan.per_block([inner])
    return TapPlan.per_block([1 + round(i * (inner - 1) / (num_blocks - 1)) for i in range(num_blocks)])


def single(num_layers: int, num_blocks: int, layer: int | None = None) -> TapPlan:
    """Give every block the same layer.

    Args:
        num_layers: decoder layers of the MLLM.
        num_blocks: transformer blocks of the denoiser.
        layer: which one; None = the middle layer.
    """
    layer = num_layers // 2 if layer is None else layer
    check_range([layer], num_layers)
    return TapPlan.per_block([layer] * num_blocks)


def final(num_layers: int, num_blocks: int) -> TapPlan:
    """Give every block the final state, after the norm."""
    return TapPlan.per_block([num_layers] * num_blocks)


def explicit(
    num_layers: int, num_blocks: int, layers: Sequence[int] | None = None, assignment: Sequence[int] | None = None
) -> TapPlan:
    """Tap the listed layers.

    Args:
        num_layers: decoder layers of the MLLM.
        num_blocks: transformer blocks of the denoiser.
        layers: taps in block order, or fewer with `assignment`.
        assignment: the position in `layers` that each block reads.

    Raises:
        ValueError: when they don't give every block a tap, or leave one unused.
    """
    if not layers:
        raise ValueError("taps.layers must list one tap per denoiser block for taps=explicit; it is empty")
    check_range(layers, num_layers)
    # Without an assignment the list must name a tap for each block.
    if assignment is None:
        if len(layers) != num_blocks:
            raise ValueError(
                f"taps.layers has {len(layers)} taps for {num_blocks} denoiser blocks; give {num_blocks} "
                f"taps, or taps.assignment with {num_blocks} positions in taps.layers"
            )
        return TapPlan.per_block(layers)
    # With one, each block reads one of the taps, and a tap that no block reads is surely a mistake.
    if len(assignment) != num_blocks or not all(is_index(i) and i < len(layers) for i in assignment):
        raise ValueError(
            f"taps.assignment={list(assignment)} must hold {num_blocks} positions (one per denoiser block) "
            f"between 0 and {len(layers) - 1}"
        )
    if len(set(assignment)) != len(layers):
        raise ValueError(f"taps.assignment={list(assignment)} leaves taps of taps.layers unused")
    return TapPlan.per_block([layers[i] for i in assignment])


def bundle(num_layers: int, num_blocks: int, layers: Sequence[Any] | None = None, size: int | None = None) -> TapPlan:
    """Let every block read several layers, joined along channels.

    Args:
        num_layers: decoder layers of the MLLM.
        num_blocks: transformer blocks of the denoiser.
        layers: a list of layers for each block, or one list that all blocks read; None = a spread by `size`.
        size: how many layers a block reads. The depth is divided into so many equal parts, and each block reads one
            layer of each part: the first block the shallowest of each, the last block the deepest, so the final state
            is among what it reads. None = 3.

    Raises:
        ValueError: for lists of different lengths or another number of lists than blocks, and for a size out of range.
    """
    if layers:
        if size is not None:
            raise ValueError(f"taps=bundle takes taps.layers or taps.size, not both; got size={size!r}")
        return TapPlan.per_block(_list_bundles(layers, num_layers, num_blocks))
    size = 3 if size is None else size
    if not is_index(size) or not 1 <= size <= num_layers:
        raise ValueError(f"taps.size must be from 1 to {num_layers}, the MLLM's number of layers; got {size!r}")
    # Part j holds the layers from `bounds[j] + 1` to `bounds[j + 1]`.
    bounds = [round(part * num_layers / size) for part in range(size + 1)]
    bundles = []
    for block in range(num_blocks):
        height = block / (num_blocks - 1) if num_blocks > 1 else 1.0
        bundles.append([low + 1 + round(height * (high - low - 1)) for low, high in pairwise(bounds)])
    return TapPlan.per_block(bundles)


def _list_bundles(layers: Sequence[Any], num_layers: int, num_blocks: int) -> list[Sequence[int]]:
    """List the layers of each block's bundle."""
    nested = [isinstance(entry, list | tuple) for entry in layers]
    if not any(nested):
        check_range(layers, num_layers)
        return [list(layers)] * num_blocks
    if not all(nested) or len(layers) != num_blocks or len({len(entry) for entry in layers}) != 1 or not layers[0]:
        raise ValueError(
            f"taps.layers must be one list of layers for all blocks, or {num_blocks} lists (one per denoiser block) of "
            f"the same length; got {list(layers)}"
        )
    for entry in layers:
        check_range(entry, num_layers)
    return list(layers)


def learned_mix(
    num_layers: int, num_blocks: int, layers: Sequence[int] | str | None = None, shared: bool = False
) -> TapPlan:
    """Let blocks mix candidate layers with weights that they learn, a softmax for each block or one for all.

    Args:
        num_layers: decoder layers of the MLLM.
        num_blocks: transformer blocks of the denoiser.
        layers: the candidates; None = the states before the last one, as many as there are blocks or inner layers;
            `all` = every layer and the final state.
        shared: all blocks have the same weights.
    """
    if not isinstance(shared, bool):
        raise ValueError(f"taps.shared must be true or false, got {shared!r}")
    if not layers:
        layers = last_n(num_layers, min(num_blocks, num_layers - 1)).layers
    return _mix(list_candidates(layers, num_layers), num_blocks, "shared" if shared else "per_block")


def attend(num_layers: int, num_blocks: int, layers: Sequence[int] | str | None = None) -> TapPlan:
    """Let every block attend over candidate layers, token by token, with a query that it learns.

    Args:
        num_layers: decoder layers of the MLLM.
        num_blocks: transformer blocks of the denoiser.
        layers: the candidates; None or `all` = every layer and the final state.
    """
    return _mix(list_candidates(layers or EVERY_LAYER, num_layers), num_blocks, "attend")


def _mix(candidates: tuple[int, ...], num_blocks: int, mix: str) -> TapPlan:
    """Make the plan of a mix; a mix of one layer is that layer."""
    if len(candidates) == 1:
        return TapPlan.per_block(candidates * num_blocks)
    return TapPlan(candidates, (), True, num_blocks, mix)


def list_candidates(layers: Sequence[int] | str, num_layers: int) -> tuple[int, ...]:
    """List the candidates of a mix, ascending.

    Raises:
        ValueError: for a text other than `all`, and a tap out of range.
    """
    if layers == EVERY_LAYER:
        return tuple(range(1, num_layers + 1))
    if isinstance(layers, str):
        raise ValueError(f"taps.layers must be a list of layers or {EVERY_LAYER}, got {layers!r}")
    check_range(layers, num_layers)
    return tuple(sorted(set(layers)))

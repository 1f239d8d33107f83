"""Tap rules: which MLLM states feed which denoiser block.

A tap is an index into Hugging Face's `hidden_states`: 0 = embeddings, k = output of decoder layer k; the last one is
after the final norm. A rule is a function of (number of MLLM layers, number of denoiser blocks) that returns a
`TapPlan` or says what doesn't fit; its further arguments are its own options. A YAML in conf/taps/ names a rule by
`_target_` (with `_partial_: true`), so a rule of your own may live in any module.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class TapPlan:
    """Which states of the MLLM are tapped, and which denoiser block gets which.

    Attributes:
        layers: distinct tap indices to read, ascending.
        assignment: for each block the position in `layers` of its tap; empty when the taps are mixed.
        mixed: each block learns a softmax mix over all of `layers`.
        num_blocks: number of denoiser blocks.

    Raises:
        ValueError: when these contradict each other.
    """

    layers: tuple[int, ...]
    assignment: tuple[int, ...]
    mixed: bool
    num_blocks: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "assignment", tuple(self.assignment))
        ascending = all(low < high for low, high in zip(self.layers, self.layers[1:], strict=False))
        if not self.layers or not all(map(_is_index, self.layers)) or not ascending:
            raise ValueError(f"taps.layers must be ascending tap indices, got {list(self.layers)}")
        if not isinstance(self.mixed, bool):
            raise ValueError(f"taps.mixed must be true or false, got {self.mixed!r}")
        if not _is_index(self.num_blocks) or self.num_blocks == 0:
            raise ValueError(f"taps.num_blocks must be at least 1, got {self.num_blocks!r}")
        expected = 0 if self.mixed else self.num_blocks
        in_range = all(_is_index(i) and i < len(self.layers) for i in self.assignment)
        if len(self.assignment) != expected or not in_range:
            raise ValueError(
                f"taps.assignment must hold {expected} positions in taps.layers, which has {len(self.layers)}; got "
                f"{list(self.assignment)}"
            )

    @classmethod
    def per_block(cls, taps: Sequence[int]) -> "TapPlan":
        """Make the plan that gives block i the tap `taps[i]`."""
        layers = tuple(sorted(set(taps)))
        return cls(layers, tuple(layers.index(tap) for tap in taps), False, len(taps))

    @classmethod
    def from_dict(cls, values: Any) -> "TapPlan":
        """Read a plan from what `to_dict` returned.

        Raises:
            ValueError: for anything else.
        """
        names = [f.name for f in fields(cls)]
        if not isinstance(values, Mapping) or sorted(values) != sorted(names):
            raise ValueError(f"taps must hold {', '.join(names)}, got {values!r}")
        for name in ("layers", "assignment"):
            if not isinstance(values[name], list | tuple):
                raise ValueError(f"taps.{name} must be a list of whole numbers, got {values[name]!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return {
            "layers": list(self.layers),
            "assignment": list(self.assignment),
            "mixed": self.mixed,
            "num_blocks": self.num_blocks,
        }

    @property
    def deepest(self) -> int:
        return self.layers[-1]

    def list_block_layers(self) -> list[int]:
        """List the tap of each block, in block order (not for mixed taps)."""
        return [self.layers[i] for i in self.assignment]


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
    plan = rule
    if not isinstance(rule, TapPlan):
        check_call("the tap rule", rule, num_layers, num_blocks)
        try:
            plan = rule(num_layers, num_blocks)
        except (TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
            raise ValueError(
                f"the tap rule {rule!r} failed for {num_layers} layers and {num_blocks} blocks with "
                f"{type(error).__name__}: {error}"
            ) from error
    if not isinstance(plan, TapPlan):
        raise ValueError(f"a tap rule must return a TapPlan, got {plan!r}")
    check_range(plan.layers, num_layers)
    if plan.num_blocks != num_blocks:
        raise ValueError(f"the taps are for {plan.num_blocks} denoiser blocks, and this denoiser has {num_blocks}")
    return plan


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


def check_range(layers: Sequence[int], num_layers: int) -> None:
    """Raise ValueError for a tap that the MLLM doesn't have."""
    for tap in layers:
        if not _is_index(tap) or tap > num_layers:
            raise ValueError(
                f"tap index {tap} is out of range: the MLLM has {num_layers} layers, so taps run from 0 "
                f"(embeddings) to {num_layers} (final state)"
            )


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
    if len(assignment) != num_blocks or not all(0 <= i < len(layers) for i in assignment):
        raise ValueError(
            f"taps.assignment={list(assignment)} must hold {num_blocks} positions (one per denoiser block) "
            f"between 0 and {len(layers) - 1}"
        )
    if len(set(assignment)) != len(layers):
        raise ValueError(f"taps.assignment={list(assignment)} leaves taps of taps.layers unused")
    return TapPlan.per_block([layers[i] for i in assignment])


def learned_mix(num_layers: int, num_blocks: int, layers: Sequence[int] | None = None) -> TapPlan:
    """Let every block mix all candidate layers with weights that it learns.

    Args:
        num_layers: decoder layers of the MLLM.
        num_blocks: transformer blocks of the denoiser.
        layers: the candidates; None = the states before the last one, as many as there are blocks or inner layers.
    """
    if not layers:
        layers = last_n(num_layers, min(num_blocks, num_layers - 1)).layers
    check_range(layers, num_layers)
    return TapPlan(tuple(sorted(set(layers))), (), True, num_blocks)

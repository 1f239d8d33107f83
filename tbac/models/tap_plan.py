"""A tap plan: which states of the MLLM are tapped, and what each denoiser block reads of them.

A tap is an index into Hugging Face's `hidden_states`: 0 = embeddings, k = output of decoder layer k; the last one is
after the final norm. A plan is data: a checkpoint and an export hold it as plain values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

MIXES = ("per_block", "shared", "attend")


def is_index(value: Any) -> bool:
    """Whether a value is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_range(layers: Sequence[int], num_layers: int) -> None:
    """Raise ValueError for a tap that the MLLM doesn't have."""
    for tap in layers:
        if not is_index(tap) or tap > num_layers:
            raise ValueError(
                f"tap index {tap} is out of range: the MLLM has {num_layers} layers, so taps run from 0 "
                f"(embeddings) to {num_layers} (final state)"
            )


@dataclass(frozen=True)
class TapPlan:
    """Which states of the MLLM are tapped, and which denoiser block reads which.

    Attributes:
        layers: distinct tap indices to read, ascending.
        assignment: for each block the position in `layers` of its tap; or the positions of several, which are joined
            along channels, or with `mixed` are those that the block mixes, the same for all blocks that mix. Empty with
            `mixed`: all blocks mix all.
        mixed: blocks read learned mixes.
        num_blocks: number of denoiser blocks.
        mix: how they mix: `per_block` (each block has weights of its own), `shared` (all have the same), or `attend`
            (each block has a query that attends over the layers, token by token).

    Raises:
        ValueError: when these contradict each other.
    """

    layers: tuple[int, ...]
    assignment: tuple[int | tuple[int, ...], ...]
    mixed: bool
    num_blocks: int
    mix: str = "per_block"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        ascending = all(low < high for low, high in zip(self.layers, self.layers[1:], strict=False))
        if not self.layers or not all(map(is_index, self.layers)) or not ascending:
            raise ValueError(f"taps.layers must be ascending tap indices, got {list(self.layers)}")
        if not isinstance(self.mixed, bool):
            raise ValueError(f"taps.mixed must be true or false, got {self.mixed!r}")
        if self.mixed and len(self.layers) < 2:
            raise ValueError(f"taps.mixed needs at least two taps.layers, got {list(self.layers)}")
        if not is_index(self.num_blocks) or self.num_blocks == 0:
            raise ValueError(f"taps.num_blocks must be at least 1, got {self.num_blocks!r}")
        if self.mix not in MIXES or (self.mix != "per_block" and not self.mixed):
            raise ValueError(
                f"taps.mix must be one of {', '.join(MIXES)}, and per_block unless mixed; got {self.mix!r}"
            )
        # A list of one position is that position, and a mix of all layers by every block is written as none.
        assignment = tuple(map(_simplify, self.assignment))
        everything = tuple(range(len(self.layers)))
        if self.mixed and len(assignment) == self.num_blocks and set(assignment) == {everything}:
            assignment = ()
        object.__setattr__(self, "assignment", assignment)
        self._check_assignment()

    def _check_assignment(self) -> None:
        expected = 0 if self.mixed and not self._lists_several() else self.num_blocks
        positions = [position for reading in map(_as_tuple, self.assignment) for position in reading]
        in_range = all(is_index(position) and position < len(self.layers) for position in positions)
        if len(self.assignment) != expected or not in_range or () in self.assignment:
            raise ValueError(
                f"taps.assignment must hold {expected} positions in taps.layers, which has {len(self.layers)}; got "
                f"{list(self.assignment)}"
            )
        sizes = {len(_as_tuple(reading)) for reading in self.assignment}
        if not self.mixed and len(sizes) > 1:
            raise ValueError(
                "taps.assignment must give every block the same number of layers to join, got "
                f"{[list(_as_tuple(reading)) for reading in self.assignment]}"
            )
        if self.mixed and any(len(set(reading)) != len(reading) for reading in map(_as_tuple, self.assignment)):
            raise ValueError(f"taps.assignment names a layer twice in one mix: {list(self.assignment)}")
        mixes = {reading for reading in self.assignment if isinstance(reading, tuple)}
        if self.mixed and len(mixes) > 1:
            raise ValueError(f"all blocks that mix layers must mix the same ones, got the positions {sorted(mixes)}")

    def _lists_several(self) -> bool:
        return any(isinstance(reading, tuple) for reading in self.assignment)

    @classmethod
    def per_block(cls, taps: Sequence[int | Sequence[int]]) -> "TapPlan":
        """Make the plan that gives block i the tap `taps[i]`, or joins several where `taps[i]` is a list."""
        readings = [tuple(tap) if isinstance(tap, list | tuple) else (tap,) for tap in taps]
        layers = tuple(sorted({layer for reading in readings for layer in reading}))
        assignment = tuple(tuple(map(layers.index, reading)) for reading in readings)
        return cls(layers, assignment, False, len(readings))

    @classmethod
    def from_dict(cls, values: Any) -> "TapPlan":
        """Read a plan from what `to_dict` returned.

        Raises:
            ValueError: for anything else.
        """
        names = [f.name for f in fields(cls)]
        required = names[:-1]  # `mix` is left out where it is what it always was before
        if not isinstance(values, Mapping) or sorted({"mix", *values}) != sorted(names):
            raise ValueError(f"taps must hold {', '.join(required)}, got {values!r}")
        for name in ("layers", "assignment"):
            if not isinstance(values[name], list | tuple):
                raise ValueError(f"taps.{name} must be a list of whole numbers, got {values[name]!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        values = {
            "layers": list(self.layers),
            "assignment": [list(reading) if isinstance(reading, tuple) else reading for reading in self.assignment],
            "mixed": self.mixed,
            "num_blocks": self.num_blocks,
        }
        return values if self.mix == "per_block" else {**values, "mix": self.mix}

    @property
    def deepest(self) -> int:
        return self.layers[-1]

    @property
    def bundle_size(self) -> int:
        """How many layers are joined along channels to one context; 1 where blocks read single layers or mixes."""
        return 1 if self.mixed else len(_as_tuple(self.assignment[0]))

    def list_readings(self) -> list[tuple[int, ...]]:
        """List for each block the positions in `layers` that it reads."""
        if not self.assignment:
            return [tuple(range(len(self.layers)))] * self.num_blocks
        return [_as_tuple(reading) for reading in self.assignment]

    def list_contexts(self) -> tuple[list[tuple[int, ...]], list[int]]:
        """List the contexts that have to be computed, and for each block the one that it reads.

        Returns:
            The positions in `layers` of each context: those of mixes come first, one for each block that mixes or one
            for all. Blocks that read the same single layer or bundle read the same context.
        """
        readings = self.list_readings()
        # Single layers: one context for each, in their order, also where no block reads it.
        if not self.mixed and self.bundle_size == 1:
            return [(position,) for position in range(len(self.layers))], [reading[0] for reading in readings]
        shared = sorted(set(readings), key=lambda reading: (len(reading) == 1, reading))
        if not self.mixed or self.mix == "shared":
            return shared, [shared.index(reading) for reading in readings]
        # Each block that mixes has a context of its own.
        mixes = [reading for reading in readings if len(reading) > 1]
        alone: list[tuple[int, ...]] = [reading for reading in shared if len(reading) == 1]
        blocks = []
        for block, reading in enumerate(readings):
            before = sum(len(earlier) > 1 for earlier in readings[:block])
            blocks.append(before if len(reading) > 1 else len(mixes) + alone.index(reading))
        return mixes + alone, blocks

    def list_block_layers(self) -> list[int] | list[list[int]]:
        """List the tap of each block, in block order; a list of taps for each where blocks read several."""
        layers = [[self.layers[position] for position in reading] for reading in self.list_readings()]
        if self.mixed or self.bundle_size > 1:
            return layers
        return [reading[0] for reading in layers]

    def name_readings(self) -> list[str]:
        """Name what each block reads: `16`, joined layers as `5-16-27`, a mix as `mix of 1-36`."""
        names = []
        for reading in self.list_readings():
            layers = [self.layers[position] for position in reading]
            joined = "-".join(map(str, layers))
            if self.mixed and len(layers) > 1:
                consecutive = layers == list(range(layers[0], layers[-1] + 1))
                joined = f"mix of {layers[0]}..{layers[-1]}" if consecutive else f"mix of {joined}"
            names.append(joined)
        return names

    def describe(self) -> str:
        """Say in a line what the blocks read, in block order: `[16, 17, …]`, or `mix of 1..36` for every block."""
        if not self.mixed:
            return str(self.list_block_layers())
        names = self.name_readings()
        return names[0] if len(set(names)) == 1 else ", ".join(names)

    def place(self, blocks: Sequence[int], num_blocks: int, final: int) -> "TapPlan":
        """Move this plan's readings into chosen blocks of a denoiser; the other blocks read the final state.

        Where this plan joins several layers, the others read the final state as often, joined.

        Args:
            blocks: index of the block for each of this plan's blocks.
            num_blocks: number of the denoiser's blocks.
            final: tap index of the final state.
        """
        # The final state joins the tapped layers only where a block is left to read it.
        left = [final] if len(blocks) < num_blocks else []
        layers = tuple(sorted({*self.layers, *left}))
        position_of = {layer: position for position, layer in enumerate(layers)}
        rest = (position_of[final],) * self.bundle_size if left else ()
        assignment = [rest] * num_blocks
        for block, reading in zip(blocks, self.list_readings(), strict=True):
            assignment[block] = tuple(position_of[self.layers[position]] for position in reading)
        return TapPlan(layers, tuple(assignment), self.mixed, num_blocks, self.mix)


def _as_tuple(reading: int | tuple[int, ...]) -> tuple[int, ...]:
    return reading if isinstance(reading, tuple) else (reading,)


def _simplify(reading: Any) -> Any:
    if isinstance(reading, list | tuple):
        return reading[0] if len(reading) == 1 else tuple(reading)
    return reading

"""Tap rules: which MLLM states feed which denoiser block.

A tap is an index into Hugging Face's `hidden_states`: 0 = embeddings, k = output of decoder layer k; the last one is
after the final norm. A rule turns (number of MLLM layers, number of blocks) into a `TapPlan`, or says what doesn't fit.
"""

from dataclasses import dataclass

RULES = ("last_n", "uniform", "first", "middle", "single", "final", "explicit", "reversed", "learned_mix")


@dataclass(frozen=True)
class TapPlan:
    """Which states are read and who gets them.

    Attributes:
        layers: distinct tap indices to read, ascending.
        assignment: for each block the position in `layers` of its tap; empty when the taps are mixed.
        mixed: each block learns a softmax mix over all of `layers`.
        num_blocks: number of denoiser blocks.
    """

    layers: tuple[int, ...]
    assignment: tuple[int, ...]
    mixed: bool
    num_blocks: int

    @property
    def deepest(self) -> int:
        return self.layers[-1]

    def layer_of_block(self) -> list[int]:
        """The tap of each block, in block order (not for mixed taps)."""
        return [self.layers[i] for i in self.assignment]


@dataclass(frozen=True)
class TapRule:
    """A named way of choosing taps.

    Args:
        rule: one of `RULES`.
            `last_n`: the n states before the last, ascending (the release: `hidden_states[-(n + 1):-1]`).
            `uniform`: evenly spread from layer 1 to the one before the last. `first`: layers 1..n. `middle`: n centred.
            `single`: one layer (`layer`) to every block. `final`: the last state, after the norm, to every block.
            `explicit`: `layers` in block order. `reversed`: `last_n` from deep to shallow.
            `learned_mix`: every block mixes all candidates (`layers`, or those of `last_n`).
        layers: taps in block order for `explicit`; candidates for `learned_mix`.
        layer: the tap of `single`; None = the middle layer.
        assignment: for `explicit` with fewer taps than blocks: the position in `layers` that each block reads.
    """

    rule: str = "last_n"
    layers: tuple[int, ...] | None = None
    layer: int | None = None
    assignment: tuple[int, ...] | None = None

    def resolve(self, num_layers: int, num_blocks: int) -> TapPlan:
        """Fit the rule to a model.

        Args:
            num_layers: decoder layers of the MLLM; taps run from 0 to `num_layers`.
            num_blocks: transformer blocks of the denoiser.

        Raises:
            ValueError: for an unknown rule, a tap out of range, or counts that don't fit.
        """
        if self.rule not in RULES:
            raise ValueError(f"taps.rule must be one of {', '.join(RULES)}; got {self.rule!r}")
        if self.rule == "learned_mix":
            candidates = self.layers or self._spread("last_n", num_layers, min(num_blocks, num_layers - 1))
            self._check_range(candidates, num_layers)
            return TapPlan(tuple(sorted(set(candidates))), (), True, num_blocks)
        per_block = self._per_block(num_layers, num_blocks)
        self._check_range(per_block, num_layers)
        layers = tuple(sorted(set(per_block)))
        return TapPlan(layers, tuple(layers.index(tap) for tap in per_block), False, num_blocks)

    def _per_block(self, num_layers: int, num_blocks: int) -> list[int]:
        if self.rule == "final":
            return [num_layers] * num_blocks
        if self.rule == "single":
            return [num_layers // 2 if self.layer is None else self.layer] * num_blocks
        if self.rule == "explicit":
            return self._explicit(num_layers, num_blocks)
        if self.rule == "reversed":
            return self._spread("last_n", num_layers, num_blocks)[::-1]
        return self._spread(self.rule, num_layers, num_blocks)

    def _explicit(self, num_layers: int, num_blocks: int) -> list[int]:
        if not self.layers:
            raise ValueError("taps.layers must list one tap per denoiser block for taps.rule=explicit; it is empty")
        self._check_range(self.layers, num_layers)
        if self.assignment is None:
            if len(self.layers) != num_blocks:
                raise ValueError(
                    f"taps.layers has {len(self.layers)} taps for {num_blocks} denoiser blocks; give {num_blocks} "
                    f"taps, or taps.assignment with {num_blocks} positions in taps.layers"
                )
            return list(self.layers)
        if len(self.assignment) != num_blocks or not all(0 <= i < len(self.layers) for i in self.assignment):
            raise ValueError(
                f"taps.assignment={list(self.assignment)} must hold {num_blocks} positions (one per denoiser block) "
                f"between 0 and {len(self.layers) - 1}"
            )
        if len(set(self.assignment)) != len(self.layers):
            raise ValueError(f"taps.assignment={list(self.assignment)} leaves taps of taps.layers unused")
        return [self.layers[i] for i in self.assignment]

    @staticmethod
    def _spread(rule: str, num_layers: int, count: int) -> list[int]:
        """`count` layers out of 1 .. num_layers - 1, the states before the final one."""
        inner = num_layers - 1
        if count > inner:
            raise ValueError(
                f"taps.rule={rule} needs {count} taps, one per denoiser block, but the MLLM has {inner} states between "
                "its embeddings and its final state; use taps.rule=explicit with taps.assignment"
            )
        if rule == "first":
            return list(range(1, count + 1))
        if rule == "middle":
            start = 1 + (inner - count) // 2
            return list(range(start, start + count))
        if rule == "uniform":
            if count == 1:
                return [inner]
            return [1 + round(i * (inner - 1) / (count - 1)) for i in range(count)]
        return list(range(num_layers - count, num_layers))

    @staticmethod
    def _check_range(layers: tuple[int, ...] | list[int], num_layers: int) -> None:
        bad = [tap for tap in layers if not 0 <= tap <= num_layers]
        if bad:
            raise ValueError(
                f"tap index {bad[0]} is out of range: the MLLM has {num_layers} layers, so taps run from 0 "
                f"(embeddings) to {num_layers} (final state)"
            )

"""How far training has come in a mixture. Checkpoints keep it; resuming warns when the order of samples has changed."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from tbac.data.shards import Source

log = logging.getLogger(__name__)
BUCKETS = "data.buckets"
DECIDE_THE_ORDER = ("data.seed", "data.shuffle_buffer")


def check_state(state: Any) -> None:
    """Raise ValueError for a position in the data that has another form than `MixturePosition.to_state_dict` gives."""

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**63

    def is_source(entry: Any) -> bool:
        return (
            isinstance(entry, Mapping)
            and all(isinstance(entry.get(name), str) for name in ("path", "split"))
            and all(is_count(entry.get(name)) for name in ("samples", "drawn"))
        )

    def is_draw(draw: Any) -> bool:
        return isinstance(draw, list | tuple) and len(draw) == 3 and all(map(is_count, draw))

    fields = state if isinstance(state, Mapping) else {}
    sources, waiting = fields.get("sources"), fields.get("waiting", [])
    is_right = {
        "position": is_count(fields.get("position")),
        "sources": isinstance(sources, list | tuple) and all(map(is_source, sources)),
        "waiting": isinstance(waiting, list | tuple) and all(map(is_draw, waiting)),
        "circumstances": isinstance(fields.get("circumstances"), Mapping),
    }
    wrong = [name for name, right in is_right.items() if not right]
    if wrong:
        raise ValueError(f"the position in the data that the checkpoint holds can't be read: {', '.join(wrong)}")


class MixturePosition:
    """The place in the sequence of draws after the last batch that training took.

    Args:
        sources: of the mixture.
        samples: how many each source has in all its shards.

    Attributes:
        state: where `TrainingOrder` resumes, from `BatchPlan.after`; None at the beginning.
    """

    def __init__(self, sources: Sequence[Source], samples: Sequence[int]) -> None:
        self.sources, self.samples = list(sources), list(samples)
        self.state: Mapping[str, Any] | None = None

    @property
    def taken(self) -> int:
        """How many samples all processes together have trained on."""
        return self.state["position"] if self.state else 0

    @property
    def drawn(self) -> list[int]:
        """How many samples of each source all processes together have trained on."""
        return list(self.state["drawn"]) if self.state else [0] * len(self.sources)

    def to_state_dict(self, circumstances: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint keeps.

        Args:
            circumstances: option -> value, for all options that decide the sequence of samples, or how the processes
                divide it.
        """
        sources = [
            {"path": source.path, "split": source.split, "samples": samples, "drawn": drawn}
            for source, samples, drawn in zip(self.sources, self.samples, self.drawn, strict=True)
        ]
        waiting = [list(draw) for draw in (self.state or {}).get("waiting", ())]
        return {
            "position": self.taken, "sources": sources, "waiting": waiting, "circumstances": dict(circumstances),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], circumstances: Mapping[str, Any]) -> None:
        """Resume from what a checkpoint kept, and warn of what has changed since and what it does to the order.

        Args:
            state: from `to_state_dict`.
            circumstances: the same options as they are now.

        Raises:
            ValueError: for a state of another form, as a checkpoint from elsewhere may have.
        """
        check_state(state)
        # Sources may have been added, removed or moved, so each is found again by its path and split.
        drawn, places = self._match_sources(state["sources"])
        position = {"position": state["position"], "drawn": drawn}
        # Draws wait only where there are buckets, and those of a removed source are dropped.
        waiting = [(p, places[s], n) for p, s, n in state.get("waiting", ()) if s in places]
        if circumstances[BUCKETS]:
            position["waiting"] = waiting
        self.state = position
        # Someone who resumes with other options wants to know whether samples of this pass may repeat.
        before = state["circumstances"]
        changed = [name for name in circumstances if name in before and before[name] != circumstances[name]]
        if not changed:
            return
        drops_waiting = bool(waiting) and not circumstances[BUCKETS]
        reordered = drops_waiting or any(before.get(name) != circumstances[name] for name in DECIDE_THE_ORDER)
        consequence = "no sample of this pass is repeated or lost"
        if reordered:
            consequence = "the order is another one, and samples of this pass may repeat"
        changes = ", ".join(f"{name} {before[name]} -> {circumstances[name]}" for name in changed)
        log.warning("going on at sample %d with %s; %s", state["position"], changes, consequence)

    def _match_sources(self, kept: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[int, int]]:
        """Find the sources of a checkpoint among those of now.

        Returns:
            How many samples of each source of now were taken; and index in the checkpoint -> index now.
        """
        drawn = [0] * len(self.sources)
        places: dict[int, int] = {}
        numbers = {(entry["path"], entry["split"]): number for number, entry in enumerate(kept)}
        for index, source in enumerate(self.sources):
            number = numbers.pop((source.path, source.split), None)
            if number is None:
                log.warning("%s wasn't part of the mixture before, so it is read from its beginning", source.path)
                continue
            drawn[index], places[number] = kept[number]["drawn"], index
            if kept[number]["samples"] != self.samples[index]:
                log.warning(
                    "%s has %d samples, it had %d: its order is another one, and samples of this pass may repeat",
                    source.path,
                    self.samples[index],
                    kept[number]["samples"],
                )
        for path, _ in numbers:
            log.warning("%s was part of the mixture before and isn't any more", path)
        return drawn, places

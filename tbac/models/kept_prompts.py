"""Prompts that run through the frozen MLLM once: what the queries read of them is kept, and read in every later epoch.

Nothing of a prompt depends on what trains, so its keys, values, next position and tapped states are always the same.

- A prompt that isn't kept yet runs alone, not with the others of its batch. So what is kept doesn't depend on the batch
  that needed it first, and a run that goes on with an empty cache computes the same bits as one that was never stopped.
- A key is the digest of all that the numbers depend on: MLLM, precision, prompt code, system message, text and pixels.
  A caption or an image that was dropped makes another prompt, with a key of its own.
- Depth is no part of the key: an entry of many layers serves a run that reads fewer. So the runs of a sweep over tap
  rules share one cache.
- The tokens that all prompts begin with aren't stored: the MLLM keeps their keys and values itself.
- Loader processes look the entries up and join them. They hand on the text and images of what they don't find, and
  the training process runs those, which alone has the model.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tbac.models.kept import Entry, Store
from tbac.models.mllm import FrozenMLLM, Prefix
from tbac.models.prompt import PromptInputs, PromptProcessor
from tbac.pictures import to_upright_rgb

KEYS_VALUES = "keys_values"  # (layer, 2, head, token, channel): keys and values, without the shared tokens
NEXT = "next_position"
FEATURES, GRID = "features", "grid"
ImageGroups = Sequence[Sequence[Image.Image] | None]


class CachedInputs(PromptInputs):
    """What a prompt cache gives in place of `PromptInputs`.

    Either everything was found, and it is joined: `keys_values` (layer, 2, batch, head, token, channel), `lengths`
    (batch,), `next_position` (batch,) and perhaps `states` (tap, batch, token, hidden), or `image_features` (merged
    patch, hidden). Or something is missing: `entries`, with None where nothing was found, and `waiting`, what is to be
    computed there.
    """


@dataclass(frozen=True)
class Waiting:
    """What a loader process hasn't found.

    Attributes:
        place: its index among the prompts, or the images, of the batch.
        key: that it is kept by.
        inputs: text and images of a prompt; pixels and grid of an image.
    """

    place: int
    key: str
    inputs: tuple[Any, Any]


class PromptCache(ABC):
    """What both kinds of cache share: they stand in the place of `model.prompt`, and give the prefix of a batch.

    Args:
        prompt: the model's prompt code.
        store: keeps entries.
        fingerprint: digest of all that entries depend on, apart from text and images.
        layers: tap indices at which the prompt's own states are read.
        depth: layers that the queries pass through.
    """

    def __init__(
        self, prompt: PromptProcessor, store: Store, fingerprint: str, depth: int, layers: Sequence[int] = ()
    ) -> None:
        self.prompt, self.store, self.fingerprint = prompt, store, fingerprint
        self.depth, self.layers = depth, tuple(layers)
        self.computed = 0  # entries that weren't kept, and were computed in this process

    @abstractmethod
    def __call__(
        self, texts: Sequence[str], images: ImageGroups | None = None, reference_size: tuple[int, int] | None = None
    ) -> CachedInputs:
        """Build the inputs of a batch out of what is kept; arguments as of `PromptProcessor`."""

    @abstractmethod
    def read_prefix(self, inputs: Mapping[str, Any], mllm: FrozenMLLM) -> Prefix:
        """Return what the query pass reads of a batch; what wasn't kept is computed and kept.

        Args:
            inputs: what this object made, on the model's device.
            mllm: computes what is missing.
        """

    def complete(self, inputs: Mapping[str, Any], mllm: FrozenMLLM) -> list[Entry]:
        """Return the entries of a batch, and compute and keep those that were waiting."""
        entries = list(inputs["entries"])
        latest: dict[str, Entry] = {}  # several prompts of a batch may be the same, such as dropped captions
        for waiting in inputs["waiting"]:
            if waiting.key not in latest:
                latest[waiting.key] = self._take(waiting, mllm)
            entries[waiting.place] = latest[waiting.key]
        return entries

    def _take(self, waiting: Waiting, mllm: FrozenMLLM) -> Entry:
        """Take an entry out of the store, where it may have come to since, or compute and keep it."""
        kept = self.store.read(waiting.key)
        if kept is not None and self.serves(kept):
            return kept
        # Autocast is on here where it is on in the rest of the step.
        with torch.inference_mode(False), torch.no_grad():
            entry = self.compute(waiting, mllm)
        self.computed += 1
        self.store.write(waiting.key, self.merge(kept, entry))
        return entry

    @abstractmethod
    def compute(self, waiting: Waiting, mllm: FrozenMLLM) -> Entry:
        """Compute one entry, alone; its tensors are on the CPU."""

    def look_up(self, key: str) -> Entry | None:
        """Return an entry that a loader process can see, if it has all that is read."""
        entry = self.store.read(key) if self.store.shared else None
        return entry if entry is not None and self.serves(entry) else None

    @abstractmethod
    def serves(self, entry: Entry) -> bool:
        """Whether an entry holds all that this model reads."""

    def merge(self, kept: Entry | None, entry: Entry) -> Entry:
        """Join what was kept, and didn't serve, with what was computed in its place."""
        return entry

    def make_key(self, text: str | None, images: Sequence[Image.Image]) -> str:
        """Compute the key of a prompt, or of an image alone."""
        total = sha256(f"{self.fingerprint} {len(images)} images".encode())
        for image in map(to_upright_rgb, images):
            total.update(f" {image.width}x{image.height} ".encode())
            total.update(image.tobytes())
        if text is not None:
            total.update(b"text " + text.encode("utf-8", "surrogatepass"))
        return total.hexdigest()


class KeptPrompts(PromptCache):
    """Keeps keys, values, next position and tapped states of whole prompts; neither prompt nor image runs again."""

    def __call__(
        self, texts: Sequence[str], images: ImageGroups | None = None, reference_size: tuple[int, int] | None = None
    ) -> CachedInputs:
        images = [None] * len(texts) if images is None else images
        data: dict[str, Any] = self.prompt.make_references(images, reference_size)
        data["shared_ids"] = torch.tensor(self.prompt.find_shared_ids(self.prompt.system_prompt), dtype=torch.long)
        entries, waiting = [], []
        for place, (text, group) in enumerate(zip(texts, images, strict=True)):
            key = self.make_key(text, group or ())
            entry = self.look_up(key)
            entries.append(entry)
            if entry is None:
                waiting.append(Waiting(place, key, (text, group)))
        found = [entry for entry in entries if entry is not None]
        data |= {"entries": entries, "waiting": waiting} if waiting else self.join(found)
        return CachedInputs(data)

    def read_prefix(self, inputs: Mapping[str, Any], mllm: FrozenMLLM) -> Prefix:
        device = mllm.get_prompt_table().device
        shared_ids = tuple(inputs["shared_ids"].tolist())
        joined: Mapping[str, Any] = inputs
        if "waiting" in inputs:
            completed = self.join(self.complete(inputs, mllm))
            joined = {name: tensor.to(device, non_blocking=True) for name, tensor in completed.items()}
        # The shared tokens come first; their keys and values are the same for all prompts.
        with torch.no_grad():
            keys_values, lengths = joined[KEYS_VALUES], joined["lengths"]
            keys, values = [], []
            for own, both in zip(keys_values, mllm.read_shared(shared_ids, self.depth), strict=True):
                expanded = [part.expand(len(lengths), -1, -1, -1) for part in both]
                keys.append(torch.cat([expanded[0], own[0]], dim=2))
                values.append(torch.cat([expanded[1], own[1]], dim=2))
            real = torch.arange(keys_values.shape[4], device=device) < lengths[:, None]
            mask = torch.cat([real.new_ones(len(real), len(shared_ids)), real], dim=1)
        states = joined.get("states")
        return Prefix(keys, values, mask, joined[NEXT], states, None if states is None else real)

    def compute(self, waiting: Waiting, mllm: FrozenMLLM) -> Entry:
        text, group = waiting.inputs
        inputs = self.prompt([text], [group])
        prefix = mllm.read_prefix(inputs.to(mllm.get_prompt_table().device), self.depth, self.layers)
        # Only what comes behind the shared tokens is kept.
        num_shared = len(inputs["shared_ids"])
        pairs = [torch.cat(pair)[:, :, num_shared:] for pair in zip(prefix.keys, prefix.values, strict=True)]
        entry = {KEYS_VALUES: torch.stack(pairs).cpu(), NEXT: prefix.next_position[0].cpu()}
        if prefix.states is not None:
            tapped = zip(self.layers, prefix.states[:, 0].cpu(), strict=True)
            entry |= {_name_state(layer): state for layer, state in tapped}
        return entry

    def join(self, entries: Sequence[Entry]) -> dict[str, Tensor]:
        """Join the entries of a batch, padded on the right to the longest."""
        lengths = [entry[KEYS_VALUES].shape[3] for entry in entries]
        joined = {
            "lengths": torch.tensor(lengths),
            NEXT: torch.stack([entry[NEXT] for entry in entries]),
            KEYS_VALUES: join_padded([entry[KEYS_VALUES][: self.depth] for entry in entries], axis=2),
        }
        if self.layers:
            joined["states"] = join_padded([self._stack_states(entry) for entry in entries], axis=1)
        return joined

    def _stack_states(self, entry: Entry) -> Tensor:
        return torch.stack([entry[_name_state(layer)] for layer in self.layers])

    def serves(self, entry: Entry) -> bool:
        keys_values = entry.get(KEYS_VALUES)
        deep = keys_values is not None and keys_values.ndim == 5 and len(keys_values) >= self.depth
        return deep and NEXT in entry and all(_name_state(layer) in entry for layer in self.layers)

    def merge(self, kept: Entry | None, entry: Entry) -> Entry:
        if kept is None or KEYS_VALUES not in kept:
            return entry
        deeper = max(kept, entry, key=lambda one: len(one[KEYS_VALUES]))
        return {**kept, **entry, KEYS_VALUES: deeper[KEYS_VALUES]}


class KeptImages(PromptCache):
    """Keeps the features of input images; the prompt still runs through the language layers."""

    def __call__(
        self, texts: Sequence[str], images: ImageGroups | None = None, reference_size: tuple[int, int] | None = None
    ) -> CachedInputs:
        entries, waiting, grids = [], [], []
        for place, image in enumerate(image for group in images or () for image in group or ()):
            key = self.make_key(None, [image])
            entry = self.look_up(key)
            entries.append(entry)
            if entry is None:
                vision = self.prompt.process_images([image])
                grids.append(vision["image_grid_thw"][0])
                waiting.append(Waiting(place, key, (vision["pixel_values"], vision["image_grid_thw"])))
            else:
                grids.append(entry[GRID])
        grid = torch.stack(grids) if grids else torch.empty(0, 3, dtype=torch.long)
        inputs = self.prompt(texts, images, reference_size=reference_size, image_grid_thw=grid)
        found = [entry[FEATURES] for entry in entries if entry is not None]
        data = dict(inputs)
        if waiting:
            data |= {"entries": entries, "waiting": waiting}
        elif found:
            data["image_features"] = torch.cat(found)
        return CachedInputs(data)

    def read_prefix(self, inputs: Mapping[str, Any], mllm: FrozenMLLM) -> Prefix:
        completed = dict(inputs)
        if "waiting" in inputs:
            features = torch.cat([entry[FEATURES] for entry in self.complete(inputs, mllm)])
            completed["image_features"] = features.to(mllm.get_prompt_table().device)
        return mllm.read_prefix(completed, self.depth, self.layers)

    def compute(self, waiting: Waiting, mllm: FrozenMLLM) -> Entry:
        pixels, grid = waiting.inputs
        features = mllm.encode_images(pixels.to(mllm.get_prompt_table().device), grid)
        return {FEATURES: features.cpu(), GRID: grid[0]}

    def serves(self, entry: Entry) -> bool:
        return FEATURES in entry and GRID in entry


def _name_state(layer: int) -> str:
    return f"state.{layer}"


def join_padded(rows: Sequence[Tensor], axis: int) -> Tensor:
    """Join tensors (…, token, channel) of unequal numbers of tokens along a new axis, with zeros behind their ends."""
    shape = list(rows[0].shape)
    shape[-2] = max(row.shape[-2] for row in rows)
    shape.insert(axis, len(rows))
    joined = rows[0].new_empty(shape)
    for index, row in enumerate(rows):
        place = joined.select(axis, index)
        place[..., : row.shape[-2], :] = row
        place[..., row.shape[-2] :, :] = 0
    return joined

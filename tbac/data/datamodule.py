"""The Lightning data module: one stage's mixture for training, one fixed pass for validation."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import Sampler

from tbac.data.buckets import BucketIndex, parse_buckets
from tbac.data.collation import Collator, PromptCode
from tbac.data.decoding import check_reducing_gap
from tbac.data.loader import CleanLoader
from tbac.data.order import BatchPlan, BucketedOrder, TrainingOrder, ValidationOrder
from tbac.data.reader import ShardReader, check_bad_share
from tbac.data.shards import DataError, Source, list_shards, parse_source, read_manifest
from tbac.data.tars import shard_sizes
from tbac.data.transforms import ConditionDropout
from tbac.types import Batch

log = logging.getLogger(__name__)


class ShardDataModule(L.LightningDataModule):
    """Streams WebDataset shards, in an order that doesn't depend on the numbers of processes and workers.

    Shards are looked up and compared with their manifests here and now, so that a wrong path fails before any model is
    loaded; `bind` then gives the prompt code of the model that will train.

    Args:
        sources: training mixture: mappings with `path`, and optionally `split` and `weight`.
        val_sources: the same for validation; no dropout, fixed order.
        batch_size: samples per process and step.
        image_size: pixels a side of target images; with buckets, of the one that is a square.
        dropout: condition dropout of training samples.
        val_batch_size: samples per process and validation step.
        val_samples: validation stops after this many samples of all processes together.
        seed: of order, mixture and dropout.
        shuffle_buffer: samples to shuffle among, per source.
        num_workers: loader processes.
        max_bad_share: greatest share of corrupt samples before training stops.
        use_latents: take cached latents where there are any.
        check_manifest: compare shards with their manifest.
        buckets: None crops targets to squares; `sana`, or a list of (height, width) in pixels, crops each to the one of
            them that is nearest to its own shape, and makes batches of one shape.
        reducing_gap: JPEG targets much larger than needed are decoded at a fraction of their size, at least this many
            times what is needed; None decodes in full.
        prefetch_factor: batches that each loader process reads ahead.

    Raises:
        DataError: for absent, empty or altered sources.
        ValueError: for other values that can't be used.
    """

    def __init__(
        self,
        sources: Sequence[Mapping[str, Any]],
        val_sources: Sequence[Mapping[str, Any]],
        batch_size: int,
        image_size: int,
        dropout: ConditionDropout | None = None,
        val_batch_size: int | None = None,
        val_samples: int = 256,
        seed: int = 42,
        shuffle_buffer: int = 1000,
        num_workers: int = 0,
        max_bad_share: float = 0.05,
        use_latents: bool = True,
        check_manifest: bool = True,
        buckets: str | Sequence[Sequence[int]] | None = None,
        reducing_gap: float | None = 2.0,
        prefetch_factor: int = 2,
    ) -> None:
        super().__init__()
        for name, count in (("stage.batch_size", batch_size), ("data.prefetch_factor", prefetch_factor)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        check_reducing_gap(reducing_gap, "data.reducing_gap")
        self.buckets, self.reducing_gap = parse_buckets(buckets, image_size), reducing_gap
        self.prefetch_factor = prefetch_factor
        self.sources = [parse_source(s) for s in sources]
        self.val_sources = [parse_source(s) for s in val_sources]
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.val_samples, self.image_size, self.num_workers = val_samples, image_size, num_workers
        self.seed, self.shuffle_buffer, self.dropout = seed, shuffle_buffer, dropout
        self.use_latents, self.max_bad_share = use_latents, max_bad_share
        check_bad_share(max_bad_share)
        if not self.sources:
            raise DataError("stage.sources is empty; name at least one folder of shards")
        self.shards = {s: list_shards(s, check_manifest) for s in [*self.sources, *self.val_sources]}
        self.sizes = {s: shard_sizes(s, shards, check_manifest) for s, shards in self.shards.items()}
        for source, sizes in self.sizes.items():
            if not sum(sizes):
                raise DataError(f"{source.path} gave no usable sample: its {source.split} shards are empty")
        if use_latents and check_manifest:
            self._check_cached_size()
        self.collator: Collator | None = None
        self._position: dict[str, Any] | None = None

    def _check_cached_size(self) -> None:
        """Refuse latents that were cached for pictures of other sizes."""
        for source in self.shards:
            manifest = read_manifest(_folder(source)) or {}
            cached = manifest.get("image_size")
            if cached and cached != self.image_size:
                raise DataError(
                    f"the cached latents of {source.path} are of pictures of {cached} pixels, stage.image_size is "
                    f"{self.image_size}; cache them again, or encode online with data.use_latents=false"
                )
            own = self.buckets.listed() if self.buckets else None
            if cached and manifest.get("buckets") != own:
                state = f"the buckets {found}" if (found := manifest.get("buckets")) else "no buckets"
                raise DataError(
                    f"the cached latents of {source.path} were made with {state}, data.buckets is another; give those, "
                    "cache them again, or encode online with data.use_latents=false"
                )

    def bind(self, prompt: PromptCode, autoencoder_digest: str | None = None, multiple: int = 1) -> None:
        """Collate with this model's prompt code.

        Args:
            prompt: `model.prompt`.
            autoencoder_digest: sha256 of the model's autoencoder; compared with that of cached latents.
            multiple: pixels that every side of a target must be a multiple of.

        Raises:
            DataError: when cached latents come from another autoencoder.
            ValueError: for sides that the model can't take.
        """
        name = "data.buckets" if self.buckets else "stage.image_size"
        for side in sorted({side for size in self._target_sizes for side in size}):
            if side % multiple:
                raise ValueError(f"{name}: sides must be multiples of {multiple} pixels for this model, got {side}")
        self.collator = Collator(prompt)
        if not (self.use_latents and autoencoder_digest):
            return
        for source in [*self.sources, *self.val_sources]:
            cached = (read_manifest(_folder(source)) or {}).get("autoencoder_digest")
            if cached and cached != autoencoder_digest:
                raise DataError(
                    f"the cached latents of {source.path} come from another autoencoder ({cached[:12]}…) than this "
                    f"model's ({autoencoder_digest[:12]}…); cache them again, or encode online with "
                    "data.use_latents=false"
                )

    @property
    def _target_sizes(self) -> Sequence[tuple[int, int]]:
        """(height, width) of the targets that there may be."""
        return self.buckets.sizes if self.buckets else [(self.image_size, self.image_size)]

    def manifest_digests(self) -> dict[str, str]:
        """Per source folder the digest of its manifest, for the log of a run."""
        found = {}
        for source in [*self.sources, *self.val_sources]:
            file = _folder(source) / "manifest.json"
            found[source.path] = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "none"
        return found

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _loader(self, sources: Sequence[Source], order: Sampler[BatchPlan], train: bool) -> CleanLoader:
        if self.collator is None:
            raise RuntimeError("call bind(model.prompt) before training")
        reader = ShardReader(
            [self.shards[s] for s in sources],
            [self.sizes[s] for s in sources],
            seed=self.seed,
            collate=self.collator,
            size=(self.image_size, self.image_size),
            dropout=self.dropout if train else None,
            use_latents=self.use_latents,
            max_bad_share=self.max_bad_share,
            reducing_gap=self.reducing_gap,
        )
        num_workers = self.num_workers if train else 0
        return CleanLoader(
            reader,
            sampler=order,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=self.prefetch_factor if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context="fork" if num_workers else None,
        )

    def train_dataloader(self) -> CleanLoader:
        """Endless batches of this process's share of the mixture, from the restored position on."""
        arguments = (
            [self.sizes[s] for s in self.sources],
            [s.weight for s in self.sources],
            self.seed,
            self.shuffle_buffer,
            self.batch_size,
            self._rank,
            self._world_size,
            self._position,
        )
        bucket_of = self._bucket_index(self.sources)
        order = BucketedOrder(bucket_of, *arguments) if bucket_of else TrainingOrder(*arguments)
        return self._loader(self.sources, order, train=True)

    def val_dataloader(self) -> CleanLoader | list:
        """The first `val_samples` samples, in the order of the shards."""
        if not self.val_sources:
            return []
        sizes = [self.sizes[s] for s in self.val_sources]
        order = ValidationOrder(
            sizes,
            self.val_samples,
            self.val_batch_size,
            self._rank,
            self._world_size,
            self._bucket_index(self.val_sources),
        )
        return self._loader(self.val_sources, order, train=False)

    def _bucket_index(self, sources: Sequence[Source]) -> BucketIndex | None:
        return BucketIndex(self.buckets, [self.shards[s] for s in sources], self.use_latents) if self.buckets else None

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Note how far training has come: what the loader has read ahead doesn't count."""
        if batch.after:
            self._position = batch.after
        return batch

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, non_blocking=True)

    @property
    def position(self) -> int:
        """Samples that training has taken, of all processes together."""
        return self._position["position"] if self._position else 0

    @property
    def drawn(self) -> dict[str, int]:
        """Samples that training has taken of each source, of all processes together; by folder and split."""
        counts = self._position["drawn"] if self._position else [0] * len(self.sources)
        names = [f"{_folder(s).name}-{s.split}" for s in self.sources]
        alike = {n for n in names if names.count(n) > 1}
        names = [f"{n}-{i}" if n in alike else n for i, n in enumerate(names)]
        return dict(zip(names, counts, strict=True))

    def _circumstances(self) -> dict[str, Any]:
        """What decides the sequence of samples, and how it is shared out."""
        return {
            "data.seed": self.seed,
            "data.shuffle_buffer": self.shuffle_buffer,
            "data.num_workers": self.num_workers,
            "stage.batch_size": self.batch_size,
            "number of processes": self._world_size,
            "weights of the mixture": [s.weight for s in self.sources],
            "data.buckets": self.buckets.listed() if self.buckets else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Position in the sequence of samples: after the last batch that training took."""
        position = self._position or {"position": 0, "drawn": [0] * len(self.sources)}
        drawn = [
            {"path": s.path, "split": s.split, "samples": sum(self.sizes[s]), "drawn": n}
            for s, n in zip(self.sources, position["drawn"], strict=True)
        ]
        waiting = [list(draw) for draw in position.get("waiting", ())]
        circumstances = self._circumstances()
        return {
            "position": position["position"], "sources": drawn, "waiting": waiting, "circumstances": circumstances,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a position; says what has changed since, and what it means for the order."""
        self._position = {"position": state_dict["position"], "drawn": [0] * len(self.sources)}
        places: dict[int, int] = {}  # index of a source then -> index now
        numbers = {(s["path"], s["split"]): i for i, s in enumerate(state_dict["sources"])}
        known = {(s["path"], s["split"]): s for s in state_dict["sources"]}
        for index, source in enumerate(self.sources):
            entry = known.pop((source.path, source.split), None)
            if entry is None:
                log.warning("%s wasn't part of the mixture before: it is read from its beginning", source.path)
                continue
            self._position["drawn"][index] = entry["drawn"]
            places[numbers[source.path, source.split]] = index
            if entry["samples"] != (own := sum(self.sizes[source])):
                log.warning(
                    "%s has %d samples, it had %d: its order is another one, and samples of this pass may repeat",
                    source.path,
                    own,
                    entry["samples"],
                )
        for path, _ in known:
            log.warning("%s was part of the mixture before and isn't any more", path)
        waiting = [(p, places[s], n) for p, s, n in state_dict.get("waiting", ()) if s in places]
        if self.buckets:
            self._position["waiting"] = waiting
        before, now = state_dict["circumstances"], self._circumstances()
        changed = [f"{k} {before[k]} -> {now[k]}" for k in now if k in before and before[k] != now[k]]
        if not changed:
            return
        reordered = any(before.get(k) != now[k] for k in ("data.seed", "data.shuffle_buffer"))
        reordered |= bool(waiting) and not self.buckets  # what waited for its bucket has been passed over
        log.warning(
            "going on at sample %d with %s; %s",
            state_dict["position"],
            ", ".join(changed),
            "the order is another one, and samples of this pass may repeat"
            if reordered
            else "no sample of this pass is repeated or lost",
        )


class StagedDataModule(L.LightningDataModule):
    """The data of several stages, of which one is in use.

    Args:
        stages: one data module per stage.
        current: index of the one in use; the training loop asks for new loaders when an epoch begins.
    """

    def __init__(self, stages: Sequence[ShardDataModule], current: int = 0) -> None:
        super().__init__()
        self.stages, self.current = list(stages), current

    @property
    def active(self) -> ShardDataModule:
        stage = self.stages[self.current]
        stage.trainer = self.trainer
        return stage

    @property
    def drawn(self) -> dict[str, int]:
        return self.active.drawn

    def train_dataloader(self) -> CleanLoader:
        return self.active.train_dataloader()

    def val_dataloader(self) -> CleanLoader | list:
        return self.active.val_dataloader()

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return self.active.on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return self.active.transfer_batch_to_device(batch, device, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        return self.active.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.active.load_state_dict(state_dict)


def _folder(source: Source) -> Path:
    return Path(source.path).expanduser()

"""The Lightning data module: one stage's mixture for training, one fixed pass for validation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch.utils.data import Sampler

from tbac.data.buckets import BucketIndex, parse_buckets
from tbac.data.collation import Collator, PromptCode
from tbac.data.decoding import check_reducing_gap
from tbac.data.loader import CleanLoader
from tbac.data.order import BatchPlan, BucketedOrder, Mixture, TrainingOrder, ValidationOrder
from tbac.data.position import BUCKETS, MixturePosition
from tbac.data.reader import ShardReader, check_bad_share
from tbac.data.remote import download_source, is_remote
from tbac.data.shards import DataError, SourceShards, parse_source
from tbac.data.transforms import ConditionDropout
from tbac.types import Batch


@dataclass(eq=False, repr=False)
class ShardDataModule(L.LightningDataModule):
    """Streams WebDataset shards, in an order that doesn't depend on the numbers of processes and workers.

    Shards are looked up and compared with their manifests here and now, so that a wrong path fails before any model is
    loaded; `bind` then gives the prompt code of the model that will train.

    Args:
        sources: training mixture: mappings with `path`, a folder or a URL, and optionally `split` and `weight`.
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
        cache_dir: folder that sources behind URLs are downloaded to.

    Raises:
        DataError: for absent, empty or altered sources.
        ValueError: for other values that can't be used.
    """

    sources: Sequence[Mapping[str, Any]]
    val_sources: Sequence[Mapping[str, Any]]
    batch_size: int
    image_size: int
    dropout: ConditionDropout | None = None
    val_batch_size: int | None = None
    val_samples: int = 256
    seed: int = 42
    shuffle_buffer: int = 1000
    num_workers: int = 0
    max_bad_share: float = 0.05
    use_latents: bool = True
    check_manifest: bool = True
    buckets: str | Sequence[Sequence[int]] | None = None
    reducing_gap: float | None = 2.0
    prefetch_factor: int = 2
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        super().__init__()
        for name, count in (("stage.batch_size", self.batch_size), ("data.prefetch_factor", self.prefetch_factor)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        check_reducing_gap(self.reducing_gap, "data.reducing_gap")
        check_bad_share(self.max_bad_share)
        self._buckets = parse_buckets(self.buckets, self.image_size)
        if not self.sources:
            raise DataError("stage.sources is empty; name at least one folder of shards")
        # What lies on disk is looked up before any model is loaded.
        self._training = [self._find_shards(fields) for fields in self.sources]
        self._validation = [self._find_shards(fields) for fields in self.val_sources]
        for shards in [*self._training, *self._validation]:
            if not sum(shards.samples):
                raise DataError(
                    f"{shards.source.path} gave no usable sample: its {shards.source.split} shards are empty"
                )
            if self.use_latents and self.check_manifest:
                self._check_cached_size(shards)
        self._position = MixturePosition(
            [shards.source for shards in self._training], [sum(shards.samples) for shards in self._training]
        )
        self._collator: Collator | None = None

    def _find_shards(self, fields: Mapping[str, Any]) -> SourceShards:
        source = parse_source(fields)
        folder = download_source(source, self.cache_dir) if is_remote(source) else None
        return SourceShards(source, self.check_manifest, folder)

    def _check_cached_size(self, shards: SourceShards) -> None:
        """Refuse latents that were cached for pictures of other sizes."""
        path, manifest = shards.source.path, shards.manifest or {}
        cached = manifest.get("image_size")
        if cached and cached != self.image_size:
            raise DataError(
                f"the cached latents of {path} are of pictures of {cached} pixels, stage.image_size is "
                f"{self.image_size}; cache them again, or encode online with data.use_latents=false"
            )
        if cached and manifest.get("buckets") != self._listed_buckets:
            cached_buckets = manifest.get("buckets")
            state = f"the buckets {cached_buckets}" if cached_buckets else "no buckets"
            raise DataError(
                f"the cached latents of {path} were made with {state}, data.buckets is another; give those, "
                "cache them again, or encode online with data.use_latents=false"
            )

    @property
    def _listed_buckets(self) -> list[list[int]] | None:
        return self._buckets.listed() if self._buckets else None

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
        name = "data.buckets" if self._buckets else "stage.image_size"
        target_sizes = self._buckets.sizes if self._buckets else [(self.image_size, self.image_size)]
        for side in sorted({side for size in target_sizes for side in size}):
            if side % multiple:
                raise ValueError(f"{name}: sides must be multiples of {multiple} pixels for this model, got {side}")
        self._collator = Collator(prompt)
        if not (self.use_latents and autoencoder_digest):
            return
        for shards in [*self._training, *self._validation]:
            cached = (shards.manifest or {}).get("autoencoder_digest")
            if cached and cached != autoencoder_digest:
                raise DataError(
                    f"the cached latents of {shards.source.path} come from another autoencoder ({cached[:12]}…) than "
                    f"this model's ({autoencoder_digest[:12]}…); cache them again, or encode online with "
                    "data.use_latents=false"
                )

    def manifest_digests(self) -> dict[str, str]:
        """Per source folder the digest of its manifest, for the log of a run."""
        return {shards.source.path: shards.manifest_digest for shards in [*self._training, *self._validation]}

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def train_dataloader(self) -> CleanLoader:
        """Endless batches of this process's share of the mixture, from the restored position on."""
        mixture = Mixture(
            [shards.samples for shards in self._training],
            [shards.source.weight for shards in self._training],
            self.seed,
            self.shuffle_buffer,
        )
        place = (self.batch_size, self._rank, self._world_size, self._position.state)
        bucket_of = self._bucket_index(self._training)
        order = BucketedOrder(bucket_of, mixture, *place) if bucket_of else TrainingOrder(mixture, *place)
        return self._loader(self._training, order, self.num_workers, self.dropout)

    def val_dataloader(self) -> CleanLoader | list:
        """The first `val_samples` samples, in the order of the shards; without workers and without dropout."""
        if not self._validation:
            return []
        order = ValidationOrder(
            [shards.samples for shards in self._validation],
            self.val_samples,
            self.val_batch_size or self.batch_size,
            self._rank,
            self._world_size,
            self._bucket_index(self._validation),
        )
        return self._loader(self._validation, order, num_workers=0, dropout=None)

    def _bucket_index(self, sources: Sequence[SourceShards]) -> BucketIndex | None:
        if self._buckets is None:
            return None
        return BucketIndex(self._buckets, [shards.tars for shards in sources], self.use_latents)

    def _loader(
        self,
        sources: Sequence[SourceShards],
        order: Sampler[BatchPlan],
        num_workers: int,
        dropout: ConditionDropout | None,
    ) -> CleanLoader:
        if self._collator is None:
            raise RuntimeError("call bind(model.prompt) before training")
        reader = ShardReader(
            [shards.tars for shards in sources],
            [shards.samples for shards in sources],
            seed=self.seed,
            collate=self._collator,
            size=(self.image_size, self.image_size),
            dropout=dropout,
            use_latents=self.use_latents,
            max_bad_share=self.max_bad_share,
            reducing_gap=self.reducing_gap,
        )
        return CleanLoader(
            reader,
            sampler=order,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=self.prefetch_factor if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context="fork" if num_workers else None,
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Note how far training has come: what the loader has read ahead doesn't count."""
        if batch.after:
            self._position.state = batch.after
        return batch

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, non_blocking=True)

    @property
    def position(self) -> int:
        """Samples that training has taken, of all processes together."""
        return self._position.taken

    @property
    def drawn(self) -> dict[str, int]:
        """Samples that training has taken of each source, of all processes together; by folder and split."""
        names = [f"{shards.folder.name}-{shards.source.split}" for shards in self._training]
        repeated = {name for name in names if names.count(name) > 1}
        names = [f"{name}-{i}" if name in repeated else name for i, name in enumerate(names)]
        return dict(zip(names, self._position.drawn, strict=True))

    def _circumstances(self) -> dict[str, Any]:
        """What decides the sequence of samples, and how it is shared out."""
        return {
            "data.seed": self.seed,
            "data.shuffle_buffer": self.shuffle_buffer,
            "data.num_workers": self.num_workers,
            "stage.batch_size": self.batch_size,
            "number of processes": self._world_size,
            "weights of the mixture": [shards.source.weight for shards in self._training],
            BUCKETS: self._listed_buckets,
        }

    def state_dict(self) -> dict[str, Any]:
        """Position in the sequence of samples: after the last batch that training took."""
        return self._position.to_state_dict(self._circumstances())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a position; says what has changed since, and what it means for the order."""
        self._position.load_state_dict(state_dict, self._circumstances())


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

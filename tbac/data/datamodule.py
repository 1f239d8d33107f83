"""The Lightning data module: the mixture of a stage for training, and a fixed pass for validation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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

    Shards are looked up and compared with their manifests at once, so that a wrong path fails before any model is
    loaded. `bind` then passes in the prompt code of the model that will train.

    Args:
        sources: training mixture: mappings with `path`, a folder or a URL, and optionally `split` and `weight`.
        val_sources: the same for validation, which has a fixed order and no dropout.
        batch_size: samples per process and step.
        image_size: side of target images in pixels; with buckets, side of the square one.
        dropout: condition dropout of training samples.
        val_batch_size: samples per process and validation step.
        val_samples: validation stops after this many samples of all processes together.
        seed: of order, mixture and dropout.
        shuffle_buffer: how many samples of a source are shuffled among each other.
        num_workers: loader processes.
        max_bad_share: training stops when a greater share of samples is corrupt.
        use_latents: take cached latents where there are any.
        check_manifest: compare shards with their manifest.
        buckets: None crops targets to squares. `sana`, or a list of (height, width) in pixels, crops each target to the
            size with the nearest aspect ratio, and every batch then holds one size.
        reducing_gap: JPEG targets much larger than needed are decoded at a fraction of their size, as long as that is
            at least this many times what is needed; None decodes in full.
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
        # A wrong path is found here, minutes before a model would be loaded.
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
        self._latent_form: tuple[int, int] | None = None

    def _find_shards(self, fields: Mapping[str, Any]) -> SourceShards:
        """Find the shards of an entry of the config, and download them if they lie behind a URL."""
        source = parse_source(fields)
        folder = download_source(source, self.cache_dir) if is_remote(source) else None
        return SourceShards(source, self.check_manifest, folder)

    def _check_cached_size(self, shards: SourceShards) -> None:
        """Raise DataError for latents that were cached for other sizes than this stage trains on."""
        path, manifest = shards.source.path, shards.manifest or {}
        cached = manifest.get("image_size")
        if cached and cached != self.image_size:
            raise DataError(
                f"the cached latents of {path} are of pictures of {cached} pixels, stage.image_size is "
                f"{self.image_size}; cache them again, or encode online with data.use_latents=false"
            )
        if cached and manifest.get("buckets") != self._bucket_lists:
            cached_buckets = manifest.get("buckets")
            state = f"the buckets {cached_buckets}" if cached_buckets else "no buckets"
            raise DataError(
                f"the cached latents of {path} were made with {state}, and data.buckets isn't the same; set it to "
                "those, cache them again, or encode online with data.use_latents=false"
            )

    @property
    def _bucket_lists(self) -> list[list[int]] | None:
        return self._buckets.to_lists() if self._buckets else None

    def bind(
        self,
        prompt: PromptCode,
        autoencoder_digest: str | None = None,
        multiple: int = 1,
        latent_form: tuple[int, int] | None = None,
    ) -> None:
        """Prepare for a model: take its prompt code, and check that it can train on this data.

        Args:
            prompt: `model.prompt`.
            autoencoder_digest: sha256 of the model's autoencoder, to compare with the one that made cached latents.
            multiple: number of pixels that every side of a target must be a multiple of.
            latent_form: channels of the model's latents, and pixels that one of them stands for on each side; cached
                ones of another shape are then counted as bad and replaced. None takes them as they are.

        Raises:
            DataError: when cached latents come from another autoencoder.
            ValueError: for sides that the model can't take.
        """
        # The autoencoder and the denoiser's patches divide each side, without a remainder.
        name = "data.buckets" if self._buckets else "stage.image_size"
        target_sizes = self._buckets.sizes if self._buckets else [(self.image_size, self.image_size)]
        for side in sorted({side for size in target_sizes for side in size}):
            if side % multiple:
                raise ValueError(f"{name}: sides must be multiples of {multiple} pixels for this model, got {side}")
        self._collator, self._latent_form = Collator(prompt), latent_form
        # Latents of another autoencoder would train without an error, and never give a picture.
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

    def compute_manifest_digests(self) -> dict[str, str]:
        """Compute path of a source -> digest of its manifest, for the log of a run."""
        return {shards.source.path: shards.manifest_digest for shards in [*self._training, *self._validation]}

    def compute_fingerprints(self) -> dict[str, str]:
        """Compute path and split of a source -> what tells its data from others of the same names."""
        sources = [*self._training, *self._validation]
        return {f"{shards.source.path} ({shards.source.split})": shards.fingerprint for shards in sources}

    def list_inputs(self) -> list[dict[str, Any]]:
        """List what is read: name, path, digest, what for, samples and weight of each source."""
        found = []
        for context, sources in (("training", self._training), ("validation", self._validation)):
            for shards in sources:
                found.append(
                    {
                        "name": f"{shards.folder.name}-{shards.source.split}",
                        "path": shards.source.path,
                        "digest": shards.fingerprint[:12],
                        "context": context,
                        "samples": sum(shards.samples),
                        "weight": shards.source.weight,
                    }
                )
        return found

    def list_tars(self, validation: bool = False) -> list[Path]:
        """List the tars of the mixture, or those of validation, in the order of the sources."""
        sources = self._validation if validation else self._training
        return [tar for shards in sources for tar in shards.tars]

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def train_dataloader(self) -> CleanLoader:
        """Build the loader of this process's part of the mixture: endless, from the restored position on."""
        mixture = Mixture(
            [shards.samples for shards in self._training],
            [shards.source.weight for shards in self._training],
            self.seed,
            self.shuffle_buffer,
        )
        place = (self.batch_size, self._rank, self._world_size, self._position.state)
        bucket_of = self._build_bucket_index(self._training)
        order = BucketedOrder(bucket_of, mixture, *place) if bucket_of else TrainingOrder(mixture, *place)
        return self._build_loader(self._training, order, self.num_workers, self.dropout)

    def val_dataloader(self) -> CleanLoader | list:
        """Build the loader of the first `val_samples` samples, in the order of the shards, without dropout."""
        if not self._validation:
            return []
        order = ValidationOrder(
            [shards.samples for shards in self._validation],
            self.val_samples,
            self.val_batch_size or self.batch_size,
            self._rank,
            self._world_size,
            self._build_bucket_index(self._validation),
        )
        return self._build_loader(self._validation, order, num_workers=0, dropout=None)

    def _build_bucket_index(self, sources: Sequence[SourceShards]) -> BucketIndex | None:
        if self._buckets is None:
            return None
        return BucketIndex(self._buckets, [shards.tars for shards in sources], self.use_latents)

    def _build_loader(
        self,
        sources: Sequence[SourceShards],
        order: Sampler[BatchPlan],
        num_workers: int,
        dropout: ConditionDropout | None,
    ) -> CleanLoader:
        """Build a loader that reads batches of some sources in the order of their plans."""
        if self._collator is None:
            raise RuntimeError("call bind(model.prompt) before training")
        # The reader depends on a plan alone, so it may be copied into any number of workers.
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
            latent_form=self._latent_form,
            reconstruct=[shards.source.task == "reconstruct" for shards in sources],
        )
        # Plans are whole batches already (batch_size=None); forked workers share what this process has read.
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
        """Note how far training has come. This runs when a batch is used, so what was only read ahead doesn't count."""
        if batch.after:
            self._position.state = batch.after
        return batch

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, non_blocking=True)

    @property
    def position(self) -> int:
        """How many samples all processes together have trained on."""
        return self._position.taken

    @property
    def drawn(self) -> dict[str, int]:
        """Folder and split of a source -> how many of its samples all processes together have trained on."""
        names = [f"{shards.folder.name}-{shards.source.split}" for shards in self._training]
        repeated = {name for name in names if names.count(name) > 1}
        names = [f"{name}-{i}" if name in repeated else name for i, name in enumerate(names)]
        return dict(zip(names, self._position.drawn, strict=True))

    def _list_circumstances(self) -> dict[str, Any]:
        """List the options that decide the sequence of samples, or how the processes divide it."""
        return {
            "data.seed": self.seed,
            "data.shuffle_buffer": self.shuffle_buffer,
            "data.num_workers": self.num_workers,
            "stage.batch_size": self.batch_size,
            "number of processes": self._world_size,
            "weights of the mixture": [shards.source.weight for shards in self._training],
            BUCKETS: self._bucket_lists,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the sequence of samples, after the last batch that was trained on."""
        return self._position.to_state_dict(self._list_circumstances())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at a position; warns of options that have changed since, and what that does to the order."""
        self._position.load_state_dict(state_dict, self._list_circumstances())


class StagedDataModule(L.LightningDataModule):
    """The data modules of several stages; all calls go to that of the current stage.

    Args:
        stages: one data module per stage.
        current: index of the current stage. When it changes, the training loop has to ask for new loaders.
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

    def list_inputs(self) -> list[dict[str, Any]]:
        """List what the stages read, each source of a kind once."""
        found: dict[tuple[str, ...], dict[str, Any]] = {}
        for stage in self.stages:
            found |= {(source["name"], source["path"], source["context"]): source for source in stage.list_inputs()}
        return list(found.values())

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

"""The Lightning data module: one stage's mixture for training, one fixed pass for validation."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from tbac.data.collation import Collator, PromptCode
from tbac.data.shards import DataError, Source, parse_source, read_manifest
from tbac.data.stream import ShardStream
from tbac.data.transforms import ConditionDropout
from tbac.types import Batch


class ShardDataModule(L.LightningDataModule):
    """Streams WebDataset shards.

    Shards are looked up and compared with their manifests here and now, so that a wrong path fails before any model is
    loaded; `bind` then gives the prompt code of the model that will train.

    Args:
        sources: training mixture: mappings with `path`, and optionally `split` and `weight`.
        val_sources: the same for validation; no dropout, fixed order.
        batch_size: samples per process and step.
        image_size: pixels a side of target images.
        dropout: condition dropout of training samples.
        val_batch_size: samples per process and validation step.
        val_samples: validation stops after this many samples of all processes together.
        seed: of order, mixture and dropout.
        shuffle_buffer: samples to shuffle among, per source and worker.
        num_workers: loader processes.
        max_bad_share: greatest share of corrupt samples before training stops.
        use_latents: take cached latents where there are any.
        check_manifest: compare shards with their manifest.

    Raises:
        DataError: see `ShardStream`.
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
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"stage.batch_size must be at least 1, got {batch_size}")
        self.sources = [parse_source(s) for s in sources]
        self.val_sources = [parse_source(s) for s in val_sources]
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.val_samples, self.image_size, self.num_workers = val_samples, image_size, num_workers
        self.train_options: dict[str, Any] = {"seed": seed, "shuffle_buffer": shuffle_buffer, "dropout": dropout}
        self.common: dict[str, Any] = {
            "max_bad_share": max_bad_share,
            "use_latents": use_latents,
            "check_manifest": check_manifest,
        }
        self.collator: Collator | None = None
        self._stream(train=True)
        if self.val_sources:
            self._stream(train=False)

    def _stream(self, train: bool) -> ShardStream:
        rank = self.trainer.global_rank if self.trainer else 0
        world_size = self.trainer.world_size if self.trainer else 1
        if train:
            return ShardStream(self.sources, rank=rank, world_size=world_size, **self.train_options, **self.common)
        return ShardStream(self.val_sources, seed=0, rank=rank, world_size=world_size, repeat=False, **self.common)

    def bind(self, prompt: PromptCode, autoencoder_digest: str | None = None) -> None:
        """Collate with this model's prompt code.

        Args:
            prompt: `model.prompt`.
            autoencoder_digest: sha256 of the model's autoencoder; compared with that of cached latents.

        Raises:
            DataError: when cached latents come from another autoencoder.
        """
        self.collator = Collator(prompt, self.image_size)
        if not (self.common["use_latents"] and autoencoder_digest):
            return
        for source in [*self.sources, *self.val_sources]:
            cached = (read_manifest(_folder(source)) or {}).get("autoencoder_digest")
            if cached and cached != autoencoder_digest:
                raise DataError(
                    f"the cached latents of {source.path} come from another autoencoder ({cached[:12]}…) than this "
                    f"model's ({autoencoder_digest[:12]}…); cache them again, or encode online with "
                    "data.use_latents=false"
                )

    def manifest_digests(self) -> dict[str, str]:
        """Per source folder the digest of its manifest, for the log of a run."""
        found = {}
        for source in [*self.sources, *self.val_sources]:
            file = _folder(source) / "manifest.json"
            found[source.path] = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "none"
        return found

    def _loader(self, stream: ShardStream, batch_size: int, num_workers: int) -> "CleanLoader":
        if self.collator is None:
            raise RuntimeError("call bind(model.prompt) before training")
        return CleanLoader(
            stream,
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=self.collator,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            multiprocessing_context="fork" if num_workers else None,
        )

    def train_dataloader(self) -> "CleanLoader":
        """Endless batches of this process's share of the mixture."""
        stream = self._stream(train=True)
        stream.check_readers(self.num_workers)
        return self._loader(stream, self.batch_size, self.num_workers)

    def val_dataloader(self) -> "CleanLoader | list":
        """The first `val_samples` samples, in the order of the shards."""
        if not self.val_sources:
            return []
        loader = self._loader(self._stream(train=False), self.val_batch_size, 0)
        world_size = self.trainer.world_size if self.trainer else 1
        loader.max_batches = -(-self.val_samples // (self.val_batch_size * world_size))
        return loader


class CleanLoader(DataLoader):
    """A DataLoader whose data errors read the same whether a worker process or this one met them."""

    max_batches: int | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        try:
            for index, batch in enumerate(super().__iter__()):
                if self.max_batches is not None and index >= self.max_batches:
                    return
                yield batch
        except DataError as error:
            raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from None


def _folder(source: Source) -> Path:
    return Path(source.path).expanduser()

"""Caches latents: encodes target images once, and writes the latents into copies of the shards."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from data_prep.shards.conversion import make_key
from data_prep.shards.resumable import Result, ResumableWork
from data_prep.shards.writer import ShardWriter
from tbac.data.buckets import Buckets, read_sizes
from tbac.data.decoding import CorruptSampleError, check_reducing_gap, decode_sample
from tbac.data.shards import DataError, check_shards, read_manifest
from tbac.data.tars import NOWHERE, TOO_LARGE, TarIndex, TarReader
from tbac.data.transforms import crop_to
from tbac.models.autoencoder import FrozenAutoencoder
from tbac.pictures import IMAGE_EXTENSIONS

log = logging.getLogger(__name__)
NAME = "latents"  # name of this work in manifests


@dataclass(frozen=True)
class CachingOptions:
    """How latents are cached. Targets are cropped and resized as in the training that will use them.

    Args:
        image_size: side of targets in pixels, `stage.image_size` of that training.
        buckets: its `data.buckets`.
        reducing_gap: its `data.reducing_gap`.
        dtype: that latents are stored in.
        keep_images: False leaves the target images out.
        batch_size: how many images are encoded at the same time.
        device: that the autoencoder runs on.

    Raises:
        ValueError: for numbers that can't be used.
    """

    image_size: int
    buckets: Buckets | None = None
    reducing_gap: float | None = 2.0
    dtype: torch.dtype = torch.float32
    keep_images: bool = True
    batch_size: int = 16
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.batch_size < 1:
            raise ValueError(f"image_size={self.image_size} and batch_size={self.batch_size} must be at least 1 each")
        check_reducing_gap(self.reducing_gap, "reducing_gap")

    def check_sides(self, compression: int) -> None:
        """Raise ValueError for targets that an autoencoder of this compression can't encode."""
        sizes = self.buckets.sizes if self.buckets else [(self.image_size, self.image_size)]
        if any(height % compression or width % compression for height, width in sizes):
            name = "buckets" if self.buckets else f"image_size={self.image_size}"
            raise ValueError(f"{name}: sides must be a multiple of {compression}, which the autoencoder needs")

    def to_recipe(self) -> dict[str, Any]:
        """Convert to built-in types what decides the bytes of the copies."""
        return {
            "image_size": self.image_size,
            "buckets": self.buckets.to_lists() if self.buckets else None,
            "reducing_gap": self.reducing_gap,
            "dtype": str(self.dtype).removeprefix("torch."),
            "keep_images": self.keep_images,
        }

    def list_target_sizes(self, tar: Path, index: TarIndex) -> list[tuple[int, int]]:
        """List the (height, width) that training crops the target of each sample to."""
        if self.buckets is None:
            return [(self.image_size, self.image_size)] * len(index.samples)
        nearest = self.buckets.find_nearest(read_sizes(tar, use_latents=False, index=index))
        return [self.buckets.sizes[bucket] for bucket in nearest]


def cache_latents(
    source: Path,
    out: Path,
    autoencoder: FrozenAutoencoder,
    digest: str,
    options: CachingOptions,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Copy shards with the latents of their targets, or resume with the tars that aren't finished.

    Samples that can't be decoded are left out and counted.

    Args:
        source: folder of shards.
        out: folder of the copies, which have the same names.
        autoencoder: encodes the targets.
        digest: sha256 of the autoencoder, for the manifest.
        options: of the latents.
        share: rank of this process, and number of processes that divide the tars among them.

    Raises:
        DataError: when there is no tar, or `out` holds copies of another recipe.
    """
    # A folder without tars is most likely a mistyped path.
    tars = {tar.name: tar for tar in sorted(source.glob("*.tar"))}
    if not tars:
        raise DataError(f"path={source} holds no *.tar")
    manifest = read_manifest(source) or {"shards": {}}
    # Copies of other shards must not pass for these: the manifest's digests tell, or the sizes where there are none.
    entries = manifest["shards"]
    identities = {name: entries.get(name, {}).get("sha256", tar.stat().st_size) for name, tar in tars.items()}
    # Copies of a shard that was cut or changed would look whole.
    check_shards(list(tars.values()), entries)
    work = ResumableWork(out, NAME, {"source": identities, "autoencoder_digest": digest, **options.to_recipe()})
    if work.read_finished() is not None:
        return
    rank, world_size = share
    tars_of_rank = dict(list(tars.items())[rank::world_size])
    work.make_parts(tars_of_rank, partial(cache_tar, out, autoencoder, options), is_whole=partial(_is_whole, out))
    # Only the process that finishes last has the results of all, and writes the manifest.
    results = work.read_results(tars)
    if results is None:
        return
    facts = {
        **manifest,
        "autoencoder_digest": digest,
        "image_size": options.image_size,
        "buckets": options.buckets.to_lists() if options.buckets else None,
        "left_out": sum(result["left_out"] for result in results),
    }
    work.finish({name: result["shard"] for name, result in zip(tars, results, strict=True)}, facts, {})
    if facts["left_out"]:
        log.warning("%d samples couldn't be decoded and were left out", facts["left_out"])


@dataclass(frozen=True)
class _Waiting:
    """A sample whose target waits to be encoded.

    Attributes:
        key: of the sample.
        fields: of its copy, without the latents.
        latent_field: name of the field for the latents.
        pixels: of the target (3, height, width), uint8.
    """

    key: str
    fields: Mapping[str, bytes]
    latent_field: str
    pixels: Tensor


def cache_tar(out: Path, autoencoder: FrozenAutoencoder, options: CachingOptions, name: str, tar: Path) -> Result:
    """Copy one tar with the latents of its targets.

    Args:
        out: folder of the copy.
        autoencoder: encodes the targets.
        options: of the latents.
        name: of the copy.
        tar: the original.

    Returns:
        `name`; `shard`, its entry of the manifest, and `left_out`, how many samples couldn't be decoded.
    """
    writer, reader = ShardWriter(out / name), TarReader()
    index = reader.read_index(tar)
    sizes = options.list_target_sizes(tar, index)
    # Samples wait until there are enough for the autoencoder to encode at once.
    left_out = 0
    waiting: list[_Waiting] = []
    names: dict[str, str] = {}  # key of a copy -> that of its original
    for number, (key, members) in enumerate(index.samples):
        try:
            if NOWHERE in members.values() or TOO_LARGE in members.values():
                raise CorruptSampleError("a field that it has twice, or that is too large")
            raw = reader.read(tar, number)
            # Keys of shards from elsewhere may hold folders.
            raw["__key__"] = make_key(key, names) if "/" in key or key in names else key
            waiting.append(_read_target(raw, sizes[number], options))
            names[raw["__key__"]] = key
        except CorruptSampleError as error:
            log.warning("left out %s of %s: %s", key, tar, error)
            left_out += 1
        if len(waiting) == options.batch_size:
            _write_encoded(writer, waiting, autoencoder, options)
            waiting.clear()
    _write_encoded(writer, waiting, autoencoder, options)
    reader.close()
    return {"name": name, "shard": writer.close(), "left_out": left_out}


def _is_whole(out: Path, result: Result) -> bool:
    """Whether the copy that a result speaks of is there, of the size that it says."""
    copy = out / result["name"]
    return copy.is_file() and copy.stat().st_size == result["shard"]["bytes"]


def _read_target(raw: Mapping[str, Any], size: tuple[int, int], options: CachingOptions) -> _Waiting:
    """Decode and crop a sample's target, and select the fields that its copy keeps."""
    sample = decode_sample(raw, False, size, options.reducing_gap)
    assert sample.target is not None, "a sample decoded without latents has a target image"
    fields = {
        name: data
        for name, data in raw.items()
        if not name.startswith("__")
        and not name.endswith("latent.safetensors")
        and (options.keep_images or not _is_target_image(name))
    }
    latent_field = "target.latent.safetensors" if sample.sources else "latent.safetensors"
    return _Waiting(sample.key, fields, latent_field, crop_to(sample.target, size).permute(2, 0, 1))


@torch.no_grad()
def _write_encoded(
    writer: ShardWriter, waiting: list[_Waiting], autoencoder: FrozenAutoencoder, options: CachingOptions
) -> None:
    """Encode targets, those of one shape together, and write their samples in order."""
    latents: dict[int, Tensor] = {}
    for shape in {sample.pixels.shape for sample in waiting}:
        indices = [i for i, sample in enumerate(waiting) if sample.pixels.shape == shape]
        pixels = torch.stack([waiting[i].pixels for i in indices]).to(options.device)
        encoded = autoencoder.encode(pixels).to("cpu", options.dtype)
        latents |= dict(zip(indices, encoded, strict=True))
    for i, sample in enumerate(waiting):
        packed = save_safetensors({"latents": latents[i].contiguous().clone()})
        writer.add(sample.key, {**sample.fields, sample.latent_field: packed})


def _is_target_image(field: str) -> bool:
    return field.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS and not field.startswith("source")

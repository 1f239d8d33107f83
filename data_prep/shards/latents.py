"""Cached latents: what an autoencoder makes of target images, written into copies of the shards."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor
from tqdm import tqdm

from data_prep.shards.resumable import Work
from data_prep.shards.writer import ShardWriter
from tbac.data.buckets import Buckets, target_sizes
from tbac.data.decoding import CorruptSampleError, decode_sample
from tbac.data.shards import SCHEMA_VERSION, DataError, read_manifest
from tbac.data.tars import NOWHERE, TarReader
from tbac.data.transforms import crop_to
from tbac.files import write_whole
from tbac.models.autoencoder import FrozenAutoencoder

log = logging.getLogger(__name__)
WORK = ".caching"


def cache_latents(
    source: Path,
    out: Path,
    autoencoder: FrozenAutoencoder,
    digest: str,
    image_size: int,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    keep_images: bool = True,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
    buckets: Buckets | None = None,
    reducing_gap: float | None = 2.0,
) -> None:
    """Copy shards with the latents of their targets; goes on tar by tar where it stopped.

    The target is cropped and resized as training does it. Samples that can't be decoded are left out and counted.

    Args:
        source: folder of shards.
        out: folder of the copies, with the same names.
        autoencoder: encodes.
        digest: sha256 of the autoencoder, for the manifest.
        image_size: pixels a side, `stage.image_size` of the training to come.
        batch_size: images encoded at a time.
        dtype: that latents are stored in.
        keep_images: False leaves the target images out.
        rank: of this process.
        world_size: of all processes that share the tars.
        device: where the autoencoder runs.
        buckets: `data.buckets` of the training to come.
        reducing_gap: ditto, `data.reducing_gap`.

    Raises:
        DataError: when there is no tar, or the copies were made otherwise.
    """
    tars = sorted(source.glob("*.tar"))
    if not tars:
        raise DataError(f"path={source} holds no *.tar")
    recipe = {
        "source": _identity(source, tars), "autoencoder_digest": digest, "image_size": image_size,
        "dtype": str(dtype).removeprefix("torch."), "keep_images": keep_images, "reducing_gap": reducing_gap,
    }  # fmt: skip
    if buckets:
        recipe["buckets"] = buckets.listed()
    work = Work(out, WORK, recipe, "latents")
    if work.finished() is not None:
        log.info("%s is there already", out)
        return
    work.begin()
    left = [tar for tar in tars[rank::world_size] if not work.state(tar.name).is_file()]
    for tar in tqdm(left, unit="shard", desc="caching latents"):
        writer, bad = ShardWriter(out / tar.name), 0
        for key, fields in _with_latents(
            tar, autoencoder, image_size, buckets, reducing_gap, batch_size, dtype, keep_images, device
        ):
            if fields is None:
                bad += 1
            else:
                writer.add(key, fields)
        entry = {"shard": writer.close(), "left_out": bad}
        write_whole(work.state(tar.name), json.dumps(entry).encode())
    try:
        found = {tar.name: json.loads(work.state(tar.name).read_text()) for tar in tars}
    except FileNotFoundError:
        return  # another process is still at it, or has just finished it all
    manifest = {
        **(read_manifest(source) or {}),
        "schema_version": SCHEMA_VERSION,
        "shards": {name: entry["shard"] for name, entry in found.items()},
        "autoencoder_digest": digest,
        "image_size": image_size,
        "buckets": recipe.get("buckets"),
        "left_out": sum(entry["left_out"] for entry in found.values()),
    }
    work.finish(manifest, {})
    if manifest["left_out"]:
        log.warning("%d samples couldn't be decoded and were left out", manifest["left_out"])


def _identity(source: Path, tars: list[Path]) -> dict[str, Any]:
    """What tells these shards from others: sizes, and digests where a manifest has them."""
    listed = (read_manifest(source) or {"shards": {}})["shards"]
    return {tar.name: listed.get(tar.name, {}).get("sha256", tar.stat().st_size) for tar in tars}


def _sizes(tar: Path, samples: int, image_size: int, buckets: Buckets | None) -> list[tuple[int, int]]:
    """(height, width) that training crops the target of each sample to."""
    if buckets is None:
        return [(image_size, image_size)] * samples
    return [buckets.sizes[i] for i in buckets.nearest(target_sizes(tar, use_latents=False))]


Encoded = Iterator[tuple[str, Mapping[str, Any] | None]]


@torch.no_grad()
def _with_latents(
    tar: Path,
    autoencoder: FrozenAutoencoder,
    image_size: int,
    buckets: Buckets | None,
    reducing_gap: float | None,
    batch_size: int,
    dtype: torch.dtype,
    keep_images: bool,
    device: str,
) -> Encoded:
    """Samples of a tar with their latents, in order; None in place of the fields of one that can't be decoded."""
    reader = TarReader()
    waiting: list[tuple[str, dict[str, bytes], Tensor]] = []

    def flush() -> Encoded:
        if not waiting:
            return
        encoded: dict[int, Tensor] = {}
        for shape in {pixels.shape for *_, pixels in waiting}:
            alike = [i for i, (*_, pixels) in enumerate(waiting) if pixels.shape == shape]
            made = autoencoder.encode(torch.stack([waiting[i][2] for i in alike]).to(device)).to("cpu", dtype)
            encoded |= zip(alike, made, strict=True)
        for i, (key, fields, _) in enumerate(waiting):
            edit = any(name.startswith("target.") for name in fields)
            prefix = "target." if edit else ""
            kept = {k: v for k, v in fields.items() if keep_images or not _is_target(k)}
            packed = save_safetensors({"latents": encoded[i].contiguous().clone()})
            yield key, {**kept, f"{prefix}latent.safetensors": packed}
        waiting.clear()

    samples = reader.index(tar).samples
    sizes = _sizes(tar, len(samples), image_size, buckets)
    for number, (key, members) in enumerate(samples):
        raw = reader.read(tar, number)
        try:
            if NOWHERE in members.values():
                raise CorruptSampleError("a field that it has twice")
            sample = decode_sample(raw, False, sizes[number], reducing_gap)
        except CorruptSampleError as error:
            log.warning("left out %s of %s: %s", key, tar, str(error).splitlines()[0])
            yield from flush()
            yield key, None
            continue
        assert sample.target is not None
        fields = {k: v for k, v in raw.items() if not k.startswith("__") and not k.endswith("latent.safetensors")}
        waiting.append((key, fields, crop_to(sample.target, sizes[number]).permute(2, 0, 1)))
        if len(waiting) == batch_size:
            yield from flush()
    yield from flush()
    reader.close()


def _is_target(field: str) -> bool:
    return field.rsplit(".", 1)[-1] in ("jpg", "jpeg", "png", "webp") and not field.startswith("source")

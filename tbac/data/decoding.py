"""Raw WebDataset samples to `Sample`s; whatever can't be decoded completely is refused."""

import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from tbac.types import Sample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class CorruptSampleError(ValueError):
    """A sample that is incomplete or can't be decoded; the message says why."""


def decode_image(data: bytes, field: str) -> Image.Image:
    """Decode all pixels, so that a file that breaks off is noticed here."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CorruptSampleError(f"{field} is not a readable image ({error})") from None
    return image


def decode_text(raw: Mapping[str, Any]) -> str:
    """The caption (`txt`), or the instruction or caption of `json`."""
    try:
        if "txt" in raw:
            text = raw["txt"].decode()
        elif "json" in raw:
            fields = json.loads(raw["json"])
            text = fields.get("instruction", fields.get("caption")) if isinstance(fields, dict) else None
        else:
            raise CorruptSampleError("neither txt nor json")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptSampleError(f"text can't be read ({error})") from None
    if not isinstance(text, str) or not text.strip():
        raise CorruptSampleError("the caption or instruction is missing or empty")
    return text


def find_image(raw: Mapping[str, Any], name: str) -> tuple[str, bytes] | None:
    """Field and bytes of the image `name` ("" for the target of a text-to-image sample)."""
    for extension in IMAGE_EXTENSIONS:
        field = f"{name}.{extension}" if name else extension
        if field in raw:
            return field, raw[field]
    return None


def decode_sample(raw: Mapping[str, Any], use_latents: bool = True) -> Sample:
    """Decode one sample of either kind.

    Args:
        raw: fields of one key, as bytes, with `__key__` and `__url__`.
        use_latents: take cached latents where the shard has them, instead of the target image.

    Raises:
        CorruptSampleError: when a part is missing or unreadable.
    """
    key, origin = raw["__key__"], raw.get("__url__", "")
    text = decode_text(raw)
    found_names = {f.rsplit(".", 1)[0] for f in raw if f.startswith("source") and f.endswith(IMAGE_EXTENSIONS)}
    names = sorted(found_names, key=lambda name: (len(name), name))  # source_2 before source_10
    sources = []
    for name in names:
        found = find_image(raw, name)
        assert found is not None
        sources.append(decode_image(found[1], found[0]))
    has_target = any(f.startswith("target.") for f in raw)
    if has_target and not sources:
        raise CorruptSampleError("an edit sample without a source image")
    if use_latents and (packed := raw.get("target.latent.safetensors", raw.get("latent.safetensors"))):
        try:
            latents = load_safetensors(packed)["latents"]
        except (SafetensorError, KeyError) as error:
            raise CorruptSampleError(f"cached latents can't be read ({error})") from None
        if not latents.isfinite().all():
            raise CorruptSampleError("cached latents aren't finite")
        return Sample(key, text, sources, None, latents.float(), origin)
    found = find_image(raw, "target" if has_target or sources else "")
    if found is None:
        raise CorruptSampleError("no target image")
    return Sample(key, text, sources, decode_image(found[1], found[0]), None, origin)

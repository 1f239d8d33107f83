"""Decodes raw WebDataset samples into `Sample`s, and refuses whatever can't be decoded completely."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from tbac.data.transforms import crop_part
from tbac.files import ForeignFileError, describe_error, parse_json, spell_out
from tbac.pictures import IMAGE_EXTENSIONS, UNREADABLE, PictureError, decode_picture
from tbac.types import Sample

MAX_CAPTION = 2**16  # characters; a model reads a few hundred tokens
MAX_LATENT = 1e4  # scaled latents have a standard deviation of about 1
LATENT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SOURCE = re.compile(rf"(source(?:_\d+)?)\.(?:{'|'.join(IMAGE_EXTENSIONS)})")


class CorruptSampleError(ValueError):
    """A sample that is incomplete or can't be decoded. Its message is one line that can be written anywhere.

    Args:
        message: names the field and what is wrong with it.
        kind: what is wrong in a few words, the same for all samples with this fault, so that they can be counted.
    """

    def __init__(self, message: str, kind: str = "incomplete") -> None:
        super().__init__(spell_out(message.split("\n")[0]))  # what is wrong may quote the bytes
        self.kind = kind


def decode_image(
    data: bytes, field: str, size: tuple[int, int] | None = None, reducing_gap: float | None = None
) -> Image.Image:
    """Decode a field of a sample into an upright RGB picture, as `decode_picture` does.

    Raises:
        CorruptSampleError: for what isn't a readable JPEG, PNG or WebP, for an animation, and for an absurd size.
    """
    try:
        return decode_picture(data, field, size, reducing_gap)
    except PictureError as error:
        raise CorruptSampleError(str(error), error.kind) from None


def check_reducing_gap(gap: float | None, name: str) -> None:
    """Raise ValueError for a gap that would decode fewer pixels than are needed; `name` is the option's."""
    if gap is not None and gap < 1:
        raise ValueError(f"{name} must be at least 1, or null to decode in full; got {gap}")


def decode_text(raw: Mapping[str, Any]) -> str:
    """Read the caption: `txt`, or else `instruction` or `caption` of `json`.

    A byte order mark, line breaks of other systems, and space around the text aren't part of it.

    Raises:
        CorruptSampleError: when there is no text, it can't be read, or is longer than any caption.
    """
    try:
        if "txt" in raw:
            text = raw["txt"].decode("utf-8-sig")
        elif "json" in raw:
            fields = parse_json(raw["json"], "json", finite=False)
            text = fields.get("instruction", fields.get("caption")) if isinstance(fields, dict) else None
        else:
            raise CorruptSampleError("neither txt nor json", "no caption")
    except (UnicodeDecodeError, ForeignFileError) as error:
        raise CorruptSampleError(f"text can't be read ({error})", "unreadable text") from None
    text = text.replace("\r\n", "\n").strip() if isinstance(text, str) else None
    if not text:
        raise CorruptSampleError("the caption or instruction is missing or empty", "no caption")
    if len(text) > MAX_CAPTION:
        message = f"the caption or instruction has {len(text)} characters; at most {MAX_CAPTION} are accepted"
        raise CorruptSampleError(message, "absurd text")
    return text


def find_image(raw: Mapping[str, Any], name: str) -> tuple[str, bytes] | None:
    """Find an image by its name without extension ("" in text-to-image samples); returns its field and its bytes."""
    for extension in IMAGE_EXTENSIONS:
        field = f"{name}.{extension}" if name else extension
        if field in raw:
            return field, raw[field]
    return None


@contextmanager
def refusing_unreadable() -> Iterator[None]:
    """Turn whatever else a parser raises for the bytes of one sample into a refusal of this sample alone."""
    try:
        yield
    except CorruptSampleError:
        raise
    except UNREADABLE as error:
        raise CorruptSampleError(f"it can't be decoded ({describe_error(error)})", "unreadable sample") from None


def decode_sample(
    raw: Mapping[str, Any],
    use_latents: bool = True,
    size: tuple[int, int] | None = None,
    reducing_gap: float | None = None,
) -> Sample:
    """Decode one text-to-image or edit sample.

    Args:
        raw: fields of one key, as bytes, with `__key__` and `__url__`.
        use_latents: take cached latents where the shard has them, instead of the target image.
        size: (height, width) in pixels that the target will be cropped to, if known.
        reducing_gap: lets a large JPEG target be decoded at a fraction of its size, as `decode_image` says; input
            images are always decoded in full.

    Raises:
        CorruptSampleError: when a part is missing or unreadable.
    """
    with refusing_unreadable():
        return _decode_fields(raw, use_latents, size, reducing_gap)


def _decode_fields(
    raw: Mapping[str, Any], use_latents: bool, size: tuple[int, int] | None, reducing_gap: float | None
) -> Sample:
    """Decode a sample; arguments as in `decode_sample`."""
    key, origin = raw["__key__"], raw.get("__url__", "")
    text = decode_text(raw)
    sources = decode_sources(raw)
    has_target = any(field.startswith("target.") for field in raw)
    if has_target and not sources:
        raise CorruptSampleError("an edit sample without a source image", "no source image")
    # Cached latents spare decoding the target image.
    packed = raw.get("target.latent.safetensors", raw.get("latent.safetensors"))
    if use_latents and packed:
        return Sample(key, text, sources, None, decode_latents(packed), origin)
    # An edit calls its image "target"; in a text-to-image sample there is only one, which needs no name.
    name = "target" if has_target or sources else ""
    image_file = find_image(raw, name)
    if image_file is None:
        raise CorruptSampleError("no target image", "no target image")
    field, data = image_file
    return Sample(key, text, sources, decode_image(data, field, size, reducing_gap), None, origin)


def decode_picture_alone(
    raw: Mapping[str, Any], rng: Random, use_latents: bool = True, size: tuple[int, int] | None = None
) -> Sample:
    """Decode one picture of a sample as both its prompt, without a text, and its target.

    Args:
        raw: fields of one key, as bytes, with `__key__` and `__url__`.
        rng: chooses among the pictures of an edit: its target and its input images.
        use_latents: take cached latents of the picture. Where an edit has them of some pictures, the others aren't
            chosen, since a batch needs latents of all its samples or of none.
        size: (height, width) in pixels that the target will be cropped to; the prompt shows the same part.

    Raises:
        CorruptSampleError: when there is no picture, only latents of one, or it is unreadable.
    """
    with refusing_unreadable():
        names = [""] if find_image(raw, "") else ["target", *list_source_names(raw)]
        pictures = {name: found for name in names if (found := find_image(raw, name))}
        if not pictures:
            raise CorruptSampleError("no picture to reconstruct; cached latents alone can't be seen", "no target image")
        cached = {name: raw.get(f"{name}.latent.safetensors" if name else "latent.safetensors") for name in pictures}
        with_latents = [name for name, packed in cached.items() if packed and use_latents]
        name = rng.choice(with_latents or list(pictures))
        field, data = pictures[name]
        picture = decode_image(data, field)
        if size is not None:
            picture = crop_part(picture, size)
        packed = cached[name] if with_latents else None
        latents = None if packed is None else decode_latents(packed)
        target = picture if packed is None else None
        return Sample(raw["__key__"], "", [picture], target, latents, raw.get("__url__", ""), reconstructs=True)


def list_source_names(raw: Mapping[str, Any]) -> list[str]:
    """List the names of the input images `source`, `source_1`, … in the order of their numbers."""
    names = {match[1] for field in raw if (match := SOURCE.fullmatch(field))}
    return sorted(names, key=lambda name: (len(name), name))  # by length first, so that 2 comes before 10


def decode_sources(raw: Mapping[str, Any]) -> list[Image.Image]:
    """Decode the input images `source`, `source_1`, … in the order of their numbers.

    Raises:
        CorruptSampleError: when one is unreadable.
    """
    sources = []
    for name in list_source_names(raw):
        image_file = find_image(raw, name)
        assert image_file is not None, "the name was taken from a field that is there"
        field, data = image_file
        sources.append(decode_image(data, field))
    return sources


def decode_latents(packed: bytes) -> Tensor:
    """Decode cached latents (channel, height, width) as float32.

    Raises:
        CorruptSampleError: for what isn't a safetensors file of such latents, all of them finite.
    """
    try:
        latents = load_safetensors(packed)["latents"]
    except (SafetensorError, *UNREADABLE) as error:
        raise CorruptSampleError(f"cached latents can't be read ({error})", "unreadable latents") from None
    problem = ""
    if latents.ndim != 3 or not latents.numel():
        problem = f"have shape {tuple(latents.shape)} instead of three axes"
    elif latents.dtype not in LATENT_TYPES:
        problem = f"are of type {latents.dtype}, which isn't one of floating point numbers of 16 bits or more"
    elif not latents.isfinite().all():
        problem = "aren't finite"
    elif latents.abs().max() > MAX_LATENT:
        problem = f"are as large as {latents.abs().max().item():.3g}; at most {MAX_LATENT:.0f} are accepted"
    if problem:
        raise CorruptSampleError(f"cached latents {problem}", "unreadable latents")
    return latents.float()

"""Builds samples with the fields that shards have."""

import json
from collections.abc import Sequence
from pathlib import PurePosixPath

from data_prep.datasets.archives import FileStore
from data_prep.datasets.folders import LookupFailedError
from data_prep.shards.conversion import Record, Rejected
from tbac.pictures import IMAGE_EXTENSIONS

MAGIC = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"))


def find_image_extension(data: bytes, name: str = "") -> str:
    """Find the extension of an image by its first bytes, or else by its name; "bin" when neither tells."""
    for magic, extension in MAGIC:
        if data.startswith(magic):
            return extension
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    suffix = PurePosixPath(name).suffix.lower().lstrip(".")
    return suffix if suffix in IMAGE_EXTENSIONS else "bin"


def build_text_to_image(key: str, text: str, image: bytes, name: str = "") -> Record:
    """Build a text-to-image sample; `name` is that of the picture's file. What is no Unicode is found later."""
    return Record(key, {find_image_extension(image, name): image, "txt": text.encode("utf-8", "surrogatepass")})


def build_edit(key: str, instruction: str, sources: Sequence[bytes], target: bytes, kind: str = "") -> Record:
    """Build an edit: `source`, `source_1`, …, `target`, and a `json` that has the same fields in every sample."""
    fields = {}
    for number, source in enumerate(sources):
        name = f"source_{number}" if number else "source"
        fields[f"{name}.{find_image_extension(source)}"] = source
    fields[f"target.{find_image_extension(target)}"] = target
    fields["json"] = json.dumps({"instruction": instruction, "kind": kind}).encode()
    return Record(key, fields)


def build_from_paths(
    store: FileStore,
    origin: str,
    key: str,
    text: object,
    output: object,
    inputs: Sequence[object] | None,
    kind: str = "",
) -> Record | Rejected:
    """Build a sample from the paths of its pictures.

    Args:
        store: finds the pictures.
        origin: path of the metadata, in the store.
        key: of the sample.
        text: caption or instruction.
        output: path of the target.
        inputs: paths of the source images of an edit; None for a text-to-image sample.
        kind: of edit.

    Returns:
        The sample, or why there is none. Values of any type are accepted, since they come from a dataset's files.
    """
    # What a row lacks is told apart from pictures that it names and that aren't there.
    if not isinstance(text, str) or not text.strip():
        return Rejected(key, "no caption")
    if not isinstance(output, str) or not output:
        return Rejected(key, "no target image")
    if inputs is not None and not inputs:
        return Rejected(key, "no source image")
    if any(not isinstance(path, str) or not path for path in inputs or ()):
        return Rejected(key, "a source image whose path isn't text")
    try:
        sources = [store.read(str(path), origin) for path in inputs or ()]
        target = store.read(output, origin)
    except LookupFailedError as error:
        return Rejected(key, f"a picture that isn't found: {error}")
    if inputs is None:
        return build_text_to_image(key, text, target, output)
    return build_edit(key, text, sources, target, kind)

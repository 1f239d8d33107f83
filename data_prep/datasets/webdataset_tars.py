"""Datasets that are published as WebDataset tars, such as BLIP3o-Pretrain-Long-Caption and BLIP3o-60k."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.datasets.fields import find_image_extension
from data_prep.shards.conversion import Record, Rejected
from tbac.data.shards import DataError
from tbac.data.tars import NOWHERE, TarReader

CAPTIONS = ("caption", "prompt", "text", "long_caption", "recaption")  # fields of `json` that may hold the caption


class WebDatasetTars:
    """Tars with an image and a caption for each key.

    The name of the tar becomes part of each key, which makes keys unique. A caption is `txt`, or else a field of
    `json`.

    Args:
        path: folder with the tars, at any depth.
        name: of the dataset.
        expected: number of samples, where it is known.
        caption: field of `json` that holds the caption; None tries the usual ones.

    Raises:
        DataError: when there is no tar.
    """

    def __init__(self, path: str, name: str, expected: int | None = None, caption: str | None = None) -> None:
        self.root, self.name, self.expected, self.caption = Path(path).expanduser(), name, expected, caption
        self.tars = sorted(self.root.rglob("*.tar"))
        if not self.tars:
            raise DataError(f"dataset.path={path} holds no *.tar")

    def list_units(self) -> Sequence[str]:
        """List the tars."""
        return [tar.relative_to(self.root).as_posix() for tar in self.tars]

    def read(self, unit: str, scratch: Path) -> Iterator[Record | Rejected]:
        """Read the samples of a tar in their order."""
        path, reader = self.root / unit, TarReader()
        index = reader.read_index(path)
        stem = unit.removesuffix(".tar")
        for number, (key, members) in enumerate(index.samples):
            name = f"{stem}_{key}"
            if NOWHERE in members.values():
                yield Rejected(name, "a field that it has twice")
                continue
            yield self._build_record(name, reader.read(path, number))
        for kind, count in index.refused.items():
            if not kind.startswith("a second"):
                for _ in range(count):
                    yield Rejected(unit, f"a member that is {kind}")
        if index.broken is not None:
            yield Rejected(f"{unit}: {index.broken}", "an archive that breaks off")

    def _build_record(self, name: str, raw: dict) -> Record | Rejected:
        images = [(field, data) for field, data in raw.items() if field in ("jpg", "jpeg", "png", "webp")]
        if len(images) != 1:
            return Rejected(name, "no target image" if not images else "several target images")
        text = raw.get("txt")
        if text is None and "json" in raw:
            try:
                values = json.loads(raw["json"])
            except (ValueError, RecursionError):
                return Rejected(name, "unreadable text")
            text = self._find_caption(values)
        if text is None:
            return Rejected(name, "no caption")
        field, data = images[0]
        fields = {find_image_extension(data, f"x.{field}"): data, "txt": text}
        if "json" in raw:
            fields["json"] = raw["json"]
        return Record(name, fields)

    def _find_caption(self, values: Any) -> bytes | None:
        """Find the caption in what the `json` field holds; None when it has none."""
        names = (self.caption,) if self.caption else CAPTIONS
        if isinstance(values, dict):
            for name in names:
                if isinstance(values.get(name), str):
                    return values[name].encode()
        return None

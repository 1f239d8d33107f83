"""Datasets that are published as WebDataset tars, such as BLIP3o-Pretrain-Long-Caption and BLIP3o-60k."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.datasets.fields import find_image_extension
from data_prep.datasets.folders import DataFolder
from data_prep.shards.conversion import Record, Rejected
from tbac.data.decoding import CorruptSampleError
from tbac.data.shards import DataError, check_shards, read_manifest
from tbac.data.tars import NOWHERE, TarReader
from tbac.files import ForeignFileError, parse_json

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
        DataError: when there is no tar, one lies outside of the folder, or one isn't as a manifest beside it says.
    """

    def __init__(self, path: str, name: str, expected: int | None = None, caption: str | None = None) -> None:
        self.root, self.name, self.expected, self.caption = Path(path).expanduser(), name, expected, caption
        self.tars = sorted(tar for tar in self.root.rglob("*.tar") if not tar.is_dir())
        if not self.tars:
            raise DataError(f"dataset.path={path} holds no *.tar")
        folder = DataFolder(self.root)
        for tar in self.tars:
            if not folder.holds(tar):
                raise DataError(f"{tar} isn't a file inside of dataset.path={path}; give the folder that it leads to")
        for parent in sorted({tar.parent for tar in self.tars}):
            self._check_manifest(parent)

    def _check_manifest(self, folder: Path) -> None:
        """Hold the tars of a folder against its manifest, if it has one of ours; another's is none of our business."""
        try:
            manifest = read_manifest(folder)
        except DataError:
            return
        if manifest is not None:
            check_shards([tar for tar in self.tars if tar.parent == folder], manifest["shards"])

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
            try:
                raw = reader.read(path, number)
            except CorruptSampleError as error:
                yield Rejected(f"{name}: {error}", error.kind)
                continue
            yield self._build_record(name, raw)
        for kind, count in index.refused.items():
            if not kind.startswith("a second"):
                for _ in range(count):
                    yield Rejected(unit, f"a member that is {kind}")
        for damage in index.damage:
            yield Rejected(f"{unit}: {damage}", "an archive with a damaged header")
        if index.broken is not None:
            yield Rejected(f"{unit}: {index.broken}", "an archive that breaks off")

    def _build_record(self, name: str, raw: dict) -> Record | Rejected:
        images = [(field, data) for field, data in raw.items() if field in ("jpg", "jpeg", "png", "webp")]
        if len(images) != 1:
            return Rejected(name, "no target image" if not images else "several target images")
        text = raw.get("txt")
        if text is None and "json" in raw:
            try:
                values = parse_json(raw["json"], "json", finite=False)
            except ForeignFileError:
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
                    return values[name].encode("utf-8", "surrogatepass")
        return None

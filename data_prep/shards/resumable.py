"""Work on a folder of shards that may be killed at any moment and goes on from there."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tbac.data.shards import MANIFEST, DataError, read_manifest
from tbac.files import write_whole


class Work:
    """A hidden folder beside the shards: how they are made, and which parts are done.

    Args:
        out: folder of the shards.
        name: of the hidden folder.
        recipe: how the shards are made; built-in types.
        field: of the manifest that keeps the recipe.
    """

    def __init__(self, out: Path, name: str, recipe: Mapping[str, Any], field: str) -> None:
        self.out, self.folder, self.recipe, self.field = out, out / name, dict(recipe), field

    def finished(self) -> dict[str, Any] | None:
        """The manifest, when all is done.

        Raises:
            DataError: when the folder holds shards that were made otherwise.
        """
        if self.folder.is_dir() or (manifest := read_manifest(self.out)) is None:
            return None
        if manifest.get(self.field, {}).get("recipe") != self.recipe:
            raise DataError(f"{self.out} holds shards that were made otherwise; give another folder with out=")
        return manifest

    def begin(self) -> None:
        """Make the hidden folder, or check that it belongs to the same work.

        Raises:
            DataError: when it doesn't, or there are other shards already.
        """
        file = self.folder / "recipe.json"
        if file.is_file():
            if json.loads(file.read_text()) != self.recipe:
                hint = f"give another folder with out=, or remove {self.folder}"
                raise DataError(f"{self.out} holds the beginning of other work; {hint}")
        elif strange := sorted(p.name for p in self.out.glob("*.tar")):
            raise DataError(
                f"{self.out} holds other shards already, such as {strange[0]}; give another folder with out="
            )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(self.recipe).encode())

    def state(self, part: str) -> Path:
        """The file that says what became of a part; it is there when the part is done."""
        return self.folder / f"{part}.json"

    def finish(self, manifest: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Write the manifest, with the recipe and more about the work in its field, and remove the hidden folder."""
        whole = {**manifest, self.field: {"recipe": self.recipe, **about}}
        write_whole(self.out / MANIFEST, (json.dumps(whole, indent=2) + "\n").encode())
        shutil.rmtree(self.folder, ignore_errors=True)

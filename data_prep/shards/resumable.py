"""Makes shards part by part, so that work which was killed at any moment resumes where it stopped.

A hidden folder beside the shards holds `recipe.json`, which says how they are made, and a file with the result of each
finished part. A finished part is never made again; a part that was cut off is made from its beginning. At the end the
manifest is written and the hidden folder removed.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tbac.data.shards import MANIFEST, SCHEMA_VERSION, DataError, read_manifest
from tbac.files import ForeignFileError, read_json, write_whole

log = logging.getLogger(__name__)
Result = dict[str, Any]  # of a part; holds built-in types
MakePart = Callable[[str, Any], Result]  # takes the name of a part, and what it is made from
VERSION = 2  # of the files of results
_in_worker: dict[str, Any] = {}  # in a process that makes parts: the work, and the function that makes a part


class ResumableWork:
    """Work on a folder of shards that can be resumed.

    Args:
        out: folder of the shards.
        name: of the work. The manifest keeps the recipe in a field of this name; with a dot before it, it is the name
            of the hidden folder.
        recipe: everything that decides the bytes of the shards, in built-in types.
    """

    def __init__(self, out: Path, name: str, recipe: Mapping[str, Any]) -> None:
        self.out, self.name, self.recipe = out, name, dict(recipe)
        self.folder = out / f".{name}"
        self.digest = _compute_digest(self.recipe)

    def read_finished(self) -> dict[str, Any] | None:
        """Read the manifest if everything is finished; else None.

        Raises:
            DataError: when the folder holds shards of another recipe.
        """
        manifest = None if self.folder.is_dir() else read_manifest(self.out)
        if manifest is None:
            return None
        kept = manifest.get(self.name)
        if not isinstance(kept, dict) or kept.get("recipe") != self.recipe:
            raise DataError(f"{self.out} holds shards that were made otherwise; give another folder with out=")
        log.info(
            "%s is there already, and what follows is of the time when it was made; to read again what was changed "
            "meanwhile, remove it or give another folder with out=",
            self.out,
        )
        return manifest

    def make_parts(
        self,
        parts: Mapping[str, Any],
        make: MakePart,
        processes: int = 1,
        is_whole: Callable[[Result], bool] = lambda result: True,
    ) -> None:
        """Make the parts that aren't done yet.

        Args:
            parts: name of a part -> what it is made from.
            make: makes a part; with several processes it must be possible to pickle it.
            processes: how many parts are made at the same time.
            is_whole: whether what a result speaks of is there as it says; if not, the part is made again.

        Raises:
            DataError: when the folder holds the beginning of other work, or other shards.
        """
        self._begin()
        left = {name: item for name, item in parts.items() if not self._is_done(name, is_whole)}
        log.info("%s: %d of %d parts are left", self.name, len(left), len(parts))
        with tqdm(total=len(parts), initial=len(parts) - len(left), unit="part", desc=self.name) as bar:
            for _ in self._make_each(left, make, processes):
                bar.update()

    def _begin(self) -> None:
        """Make the hidden folder, or check that it belongs to the same work."""
        file = self.folder / "recipe.json"
        if file.is_file():
            try:
                recipe = read_json(file)
            except ForeignFileError as error:
                # Each result says itself which recipe it was made by, so what is done isn't lost.
                log.warning("%s; it is written anew", error)
                write_whole(file, json.dumps(self.recipe).encode())
                return
            if recipe != self.recipe:
                hint = f"give another folder with out=, or remove {self.folder}"
                raise DataError(f"{self.out} holds the beginning of other work; {hint}")
            return
        other_tars = sorted(tar.name for tar in self.out.glob("*.tar"))
        if other_tars:
            raise DataError(
                f"{self.out} holds other shards already, such as {other_tars[0]}; give another folder with out="
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(self.recipe).encode())

    def _make_each(self, parts: Mapping[str, Any], make: MakePart, processes: int) -> Iterator[None]:
        """Make parts in this process or in several, and yield when one is done."""
        if processes < 2:
            for name, item in parts.items():
                self.make_part(name, item, make)
                yield
            return
        # Each process gets the work only once, so it keeps what it opens or reads for its next part.
        start = partial(_start_worker, self, make)
        with ProcessPoolExecutor(processes, get_context("spawn"), initializer=start) as pool:
            futures = [pool.submit(_make_in_worker, name, item) for name, item in parts.items()]
            for future in as_completed(futures):
                future.result()
                yield

    def make_part(self, name: str, item: Any, make: MakePart) -> None:
        """Make one part, and note that it is done."""
        result = make(name, item)
        content = {"version": VERSION, "recipe": self.digest, "digest": _compute_digest(result), "result": result}
        write_whole(self._result_file(name), json.dumps(content).encode())  # from now on the part is done

    def _read_result(self, part: str) -> Result | None:
        """Read the result of a part; None when there is none that is whole, of this version and of this recipe."""
        file = self._result_file(part)
        try:
            content = read_json(file, kind=dict)
        except ForeignFileError as error:
            if file.exists():
                log.warning("%s; the part is made again", error)
            return None
        result = content.get("result")
        about = {"version": VERSION, "recipe": self.digest, "digest": _compute_digest(result)}
        if not isinstance(result, dict) or any(content.get(name) != value for name, value in about.items()):
            log.warning("%s is damaged, or of another version or recipe; the part is made again", file)
            return None
        return result

    def _is_done(self, part: str, is_whole: Callable[[Result], bool]) -> bool:
        result = self._read_result(part)
        return result is not None and is_whole(result)

    def _result_file(self, part: str) -> Path:
        return self.folder / f"{part}.json"

    def read_results(self, parts: Mapping[str, Any]) -> list[Result] | None:
        """Read the results of all parts; None while another process makes some, or has just finished everything."""
        results = []
        for name in parts:
            result = self._read_result(name)
            if result is None:
                return None
            results.append(result)
        return results

    def finish(self, shards: Mapping[str, Any], facts: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Write the manifest, and remove the hidden folder.

        Args:
            shards: name of a tar -> its entry.
            facts: further fields of the manifest.
            about: what the manifest's field of this work holds besides the recipe.
        """
        manifest = {
            **facts,
            "schema_version": SCHEMA_VERSION,
            "shards": dict(shards),
            self.name: {"recipe": self.recipe, **about},
        }
        write_whole(self.out / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
        shutil.rmtree(self.folder, ignore_errors=True)


def _compute_digest(value: Any) -> str:
    """Compute the sha256 of built-in types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _start_worker(work: ResumableWork, make: MakePart) -> None:
    _in_worker.update(work=work, make=make)


def _make_in_worker(name: str, item: Any) -> None:
    _in_worker["work"].make_part(name, item, _in_worker["make"])

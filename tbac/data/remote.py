"""Sources behind URLs: each tar is downloaded once, as a whole, and then read like any other.

webdataset's `gopen` opens the URLs: `https://` and `http://` with curl, `pipe:` with the shell. It has no opener for
`s3://`, so the `aws` command reads that. A tar is complete before it is read: samples are read by their place in it.

A `pipe:` is a command that this machine executes. It comes from `stage.sources` alone, which the user writes. Of a
downloaded manifest only the names of tars become part of a URL, and they may hold only letters, digits, `_` and `-`.
"""

import fcntl
import hashlib
import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from webdataset.gopen import Pipe, gopen
from webdataset.shardlists import expand_urls

from tbac.data.shards import MANIFEST, DataError, Source, parse_manifest
from tbac.files import MAX_BYTES

log = logging.getLogger(__name__)
SCHEMES = ("https://", "http://", "s3://", "pipe:")
AT_ONCE = 4  # downloads that run at the same time


def is_remote(source: Source) -> bool:
    """Whether a source lies behind a URL."""
    return source.path.startswith(SCHEMES)


def download_source(source: Source, cache_dir: str | None) -> Path:
    """Download the tars of a source that aren't there yet; returns the folder that holds them.

    Args:
        source: its path is the URL of a folder with a `manifest.json` that lists the tars, or a URL or `pipe:` of tars
            with WebDataset's braces, such as `https://host/train-{000000..000099}.tar`.
        cache_dir: gets a folder for each URL.

    Raises:
        DataError: when there is no `cache_dir`, or something can't be downloaded or isn't as the manifest says.
    """
    if cache_dir is None:
        raise DataError(f"the source {source.path} is a URL; data.cache_dir must name a folder to download it to")
    # The folder is named by the URL, readable and without clashes, so the next start finds what is there.
    url = source.path.rstrip("/")
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", url.rsplit("/", 1)[-1])[:40].strip("_")
    folder = Path(cache_dir).expanduser() / f"{stem}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    # Braces list the tars themselves, in an order that gives them their names here.
    listed: Mapping[str, Mapping[str, Any]] = {}
    if url.startswith("pipe:") or url.endswith(".tar"):
        urls = {f"{source.split}-{number:06d}.tar": tar_url for number, tar_url in enumerate(expand_urls(url))}
    else:
        # The manifest is downloaded at every start, so that tars which have changed since are downloaded again.
        manifest = folder / MANIFEST
        _download(f"{url}/{MANIFEST}", manifest, limit=MAX_BYTES)
        listed = parse_manifest(manifest.read_bytes(), manifest)["shards"]
        name_of_a_tar = re.compile(rf"{re.escape(source.split)}-[A-Za-z0-9_-]+\.tar")
        urls = {name: f"{url}/{name}" for name in listed if name_of_a_tar.fullmatch(name)}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        downloads = [
            pool.submit(_download_if_absent, tar_url, folder / name, listed.get(name)) for name, tar_url in urls.items()
        ]
        for download in downloads:
            download.result()
    return folder


def _download_if_absent(url: str, file: Path, entry: Mapping[str, Any] | None) -> None:
    """Download a tar unless it is there; of several processes one downloads it, and the others wait."""
    with _lock(file):
        if not file.is_file() or (entry is not None and file.stat().st_size != entry["bytes"]):
            limit = None if entry is None else entry["bytes"]
            _download(url, file, None if entry is None else entry.get("sha256"), limit)


def _download(url: str, file: Path, sha256: str | None = None, limit: int | None = None) -> None:
    """Download a URL into a file, which gets its name only when it is complete and has the right digest.

    A server may send without end, so nothing is downloaded beyond a `limit` in bytes, where one is known.
    """
    log.info("downloading %s", url)
    partial_file = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with _open(url) as stream, partial_file.open("wb") as out:
            while chunk := stream.read(2**22):
                out.write(chunk)
                if limit is not None and out.tell() > limit:
                    raise DataError(f"{url} sends more than the {limit} bytes that are expected")
        with partial_file.open("rb") as written:
            if sha256 is not None and hashlib.file_digest(written, "sha256").hexdigest() != sha256:
                raise DataError(f"{url} isn't what its manifest says: its sha256 is another one")
        os.replace(partial_file, file)
    except OSError as error:
        raise DataError(f"{url} can't be downloaded ({error})") from None
    finally:
        partial_file.unlink(missing_ok=True)


def _open(url: str) -> Any:
    """Open a URL as a stream of bytes."""
    if url.startswith("s3://"):
        return Pipe(["aws", "s3", "cp", url, "-"], mode="rb")
    return gopen(url, "rb")


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Keep other processes of this machine from downloading the same file."""
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

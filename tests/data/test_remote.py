"""Sources behind URLs are downloaded once and are the same samples as in a folder."""

import functools
import json
import os
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from data_prep.shards.writer import write_shards
from tbac.data.datamodule import ShardDataModule
from tbac.data.remote import download_source, is_remote
from tbac.data.shards import DataError, Source, SourceShards
from tbac.data.tars import TarReader
from tests.helpers.pictures import make_noise_image


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder and notes what was asked for."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """URL of a folder of shards, four training and two validation samples; `Handler.asked` has what was asked for."""
    for split, count in (("train", 4), ("val", 2)):
        samples = ((f"{split}{i}", {"png": make_noise_image(i, (8, 8)), "txt": f"caption {i}"}) for i in range(count))
        write_shards(tmp_path / "site" / "shards", split, samples, 2)
    Handler.asked = []
    serving = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "site")))
    thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}/shards"
    serving.shutdown()
    thread.join()
    serving.server_close()


def keys(source: Source, cache: str = "cache") -> list[str]:
    shards = SourceShards(source, folder=download_source(source, cache))
    reader = TarReader()
    return [key for tar in shards.tars for key, _ in reader.read_index(tar).samples]


def test_a_folder_behind_a_url_is_that_folder(server: str, tmp_path: Path) -> None:
    source = Source(server)
    assert keys(source) == ["train0", "train1", "train2", "train3"]
    assert keys(Source(server + "/", "val")) == ["val0", "val1"]
    folder = download_source(source, "cache")
    for file in sorted(folder.glob("[!.]*")):
        assert file.read_bytes() == (tmp_path / "site" / "shards" / file.name).read_bytes()
    tars = [path for path in Handler.asked if path.endswith(".tar")]
    assert sorted(tars) == ["/shards/train-000000.tar", "/shards/train-000001.tar", "/shards/val-000000.tar"]  # once


def test_a_tar_that_has_changed_is_downloaded_again(server: str, tmp_path: Path) -> None:
    assert keys(Source(server))[0] == "train0"
    samples = [(f"other{i}", {"png": make_noise_image(i, (16, 16)), "txt": "x"}) for i in range(40)]
    write_shards(tmp_path / "site" / "shards", "train", samples, 20)
    assert keys(Source(server))[0] == "other0"


@pytest.mark.parametrize(
    "form", ["{url}/train-{{000000..000001}}.tar", "pipe:cat {folder}/train-{{000000..000001}}.tar"]
)
def test_tars_named_by_braces_need_no_manifest(form: str, server: str, tmp_path: Path) -> None:
    path = form.format(url=server, folder=tmp_path / "site" / "shards")
    assert keys(Source(path)) == ["train0", "train1", "train2", "train3"]
    assert not list(Path("cache").rglob("manifest.json"))


def test_s3_is_read_by_the_aws_command(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "bin" / "aws"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && cat "{tmp_path}/site/${{3#s3://bucket/}}"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    assert keys(Source("s3://bucket/shards", "val")) == ["val0", "val1"]


def test_training_data_come_from_a_url_and_its_position_names_it(server: str) -> None:
    data = ShardDataModule([{"path": server}], [], batch_size=2, image_size=8, cache_dir="cache")
    data.bind(lambda texts, images, **_: {"texts": texts})
    batches = iter(data.train_dataloader())
    assert {key for _ in range(2) for key in next(batches).keys} == {"train0", "train1", "train2", "train3"}
    assert [source["path"] for source in data.state_dict()["sources"]] == [server]
    with pytest.raises(DataError, match=r"is a URL; data\.cache_dir must name a folder"):
        ShardDataModule([{"path": server}], [], batch_size=2, image_size=8)


@pytest.mark.parametrize("path", ["{url}/absent", "{url}/train-000009.tar", "pipe:echo half; exit 3"])
def test_what_cant_be_downloaded_is_named_and_leaves_nothing(path: str, server: str) -> None:
    source = Source(path.format(url=server))
    with pytest.raises(DataError, match="can't be downloaded") as error:
        download_source(source, "cache")
    assert source.path in str(error.value)
    assert [file for file in Path("cache").rglob("*") if file.is_file() and not file.name.endswith(".lock")] == []


def test_bytes_that_arent_those_of_the_manifest_are_refused(server: str, tmp_path: Path) -> None:
    tar = tmp_path / "site" / "shards" / "train-000001.tar"
    damaged = bytearray(tar.read_bytes())
    damaged[1000] ^= 1
    tar.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=r"train-000001\.tar isn't what its manifest says"):
        download_source(Source(server), "cache")


@pytest.mark.parametrize(
    "name",
    ["pipe:touch trap", "train-x;touch trap;.tar", "train-$(touch trap).tar", "../../train-0.tar", "/train-0.tar"],
)
def test_a_manifest_cant_name_a_command_or_another_place(name: str, server: str, tmp_path: Path) -> None:
    file = tmp_path / "site" / "shards" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["shards"][name] = manifest["shards"]["train-000000.tar"]
    file.write_text(json.dumps(manifest))
    folder = download_source(Source(server), "cache")
    assert sorted(path.name for path in folder.glob("*.tar")) == ["train-000000.tar", "train-000001.tar"]
    assert not list(tmp_path.rglob("trap"))
    assert all("trap" not in path for path in Handler.asked)


def test_folders_arent_urls() -> None:
    assert not any(is_remote(Source(path)) for path in ("data/t2i", "/data/https", "~/pipe", "./s3://x"))


@pytest.mark.parametrize("what", ["manifest", "tar"])
def test_a_server_that_sends_without_end_is_left(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "site", "train", [("a", {"png": make_noise_image(1, (8, 8)), "txt": "x"})], 1)

    class Endless:
        def read(self, size: int) -> bytes:
            return bytes(size)

        def __enter__(self) -> "Endless":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def open_url(url: str) -> object:
        name = url.rsplit("/", 1)[-1]
        is_endless = name == "manifest.json" if what == "manifest" else name.endswith(".tar")
        return Endless() if is_endless else (tmp_path / "site" / name).open("rb")

    monkeypatch.setattr("tbac.data.remote._open", open_url)
    with pytest.raises(DataError, match=r"sends more than the \d+ bytes that are expected"):
        download_source(Source("https://host/shards"), "cache")
    assert sum(file.stat().st_size for file in Path("cache").rglob("*")) < 2**20

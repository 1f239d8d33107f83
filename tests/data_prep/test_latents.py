"""Cached latents: training on them is training on the images, and they are refused where they don't belong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from data_prep.shards.latents import CachingOptions, cache_latents
from data_prep.shards.writer import write_shards
from tbac.data.datamodule import ShardDataModule
from tbac.data.decoding import decode_sample
from tbac.data.shards import DataError
from tbac.data.tars import TarReader
from tbac.data.transforms import crop_to
from tbac.models.autoencoder import FrozenAutoencoder
from tbac.models.weights import compute_autoencoder_digest
from tests.helpers.commands import run_app
from tests.helpers.configs import compose_config
from tests.helpers.pictures import make_noise_image
from tests.helpers.shards import break_members
from tests.helpers.training import train_and_list_losses


def edits(folder: Path, count: int = 8) -> None:
    """Pictures of several sizes and modes, some of them turned by their EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    samples = []
    for i in range(count):
        target = make_noise_image(100 + i, (24 + 8 * (i % 3), 24)).convert("RGBA" if i % 4 == 1 else "RGB")
        fields: dict[str, Any] = {"source.png": make_noise_image(i, (24, 24)), "json": {"instruction": f"change {i}"}}
        if i % 4 == 2:
            target.save("turned.png", exif=exif.tobytes())
            fields["target.png"] = Path("turned.png").read_bytes()
        else:
            fields["target.png"] = target
        samples.append((f"s{i:03d}", fields))
    write_shards(folder, "train", samples, 3)


@pytest.fixture
def denoiser(in_world: Path) -> Path:
    return in_world / "backbones" / "denoiser"


def cache(denoiser: Path, out: str = "cached", **options: Any) -> None:
    autoencoder = FrozenAutoencoder.from_folder(denoiser / "vae")
    share = options.pop("share", (0, 1))
    how = CachingOptions(**{"image_size": 24} | options)
    cache_latents(Path("raw"), Path(out), autoencoder, compute_autoencoder_digest(denoiser), how, share)


def content(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def curve(model: Any, folder: str, **options: Any) -> list[float]:
    data = instantiate(
        compose_config(
            "train", "run_dir=.", "stage=ti2i_pretrain", f"stage.sources=[{{path: {folder}, split: train}}]",
            "stage.val_sources=[]", "stage.batch_size=4", *(f"data.{k}={v}" for k, v in options.items()),
        ).data
    )  # fmt: skip
    data.bind(model.prompt, model.provenance.digests["autoencoder"])
    return train_and_list_losses(model, data)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)])
def test_training_on_latents_is_training_on_images(
    denoiser: Path, in_world: Path, dtype: torch.dtype, tolerance: float
) -> None:
    from tests.helpers.worlds import load_small_model

    edits(Path("raw"))
    cache(denoiser, dtype=dtype)
    on_images = curve(load_small_model(in_world), "raw")
    model = load_small_model(in_world)
    on_latents = curve(model, "cached")
    assert on_latents == pytest.approx(on_images, rel=tolerance)
    assert len(set(on_images)) == 6
    assert next(model.autoencoder.model.encoder.parameters()).is_meta  # the encoder was never read
    assert curve(load_small_model(in_world), "cached", use_latents="false") == pytest.approx(on_images, rel=1e-6)


def test_latents_are_those_of_the_crop_that_training_makes(denoiser: Path) -> None:
    edits(Path("raw"))
    cache(denoiser, dtype=torch.bfloat16, keep_images=False)
    autoencoder, raw, cached = FrozenAutoencoder.from_folder(denoiser / "vae"), TarReader(), TarReader()
    for i in range(3):
        sample = decode_sample(raw.read(Path("raw/train-000000.tar"), i))
        assert sample.target is not None
        expected = autoencoder.encode(crop_to(sample.target, (24, 24)).permute(2, 0, 1)[None])[0]
        fields = cached.read(Path("cached/train-000000.tar"), i)
        found = decode_sample(fields)
        assert found.latents is not None
        torch.testing.assert_close(found.latents, expected, rtol=1e-2, atol=1e-2)
        assert "target.png" not in fields
        assert "source.png" in fields


def test_caching_goes_on_and_is_shared(denoiser: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edits(Path("raw"))
    cache(denoiser, "whole")
    encode, calls = FrozenAutoencoder.encode, 0

    def failing(self: Any, pixels: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return encode(self, pixels)

    monkeypatch.setattr(FrozenAutoencoder, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        cache(denoiser)
    cache(denoiser)
    assert calls == 4  # the first of three tars wasn't done again
    assert content("cached") == content("whole")
    assert not Path("cached/.latents").exists()
    for rank in (1, 0):
        cache(denoiser, "shared", share=(rank, 2))
    assert content("shared") == content("whole")
    cache(denoiser)
    assert calls == 7
    with pytest.raises(DataError, match="made otherwise"):
        cache(denoiser, image_size=16)


def test_what_cant_be_decoded_is_left_out_and_counted(denoiser: Path) -> None:
    edits(Path("raw"))
    break_members(Path("raw/train-000001.tar"), {"s004.target.png": b"garbage"})
    manifest = json.loads(Path("raw/manifest.json").read_text())
    del manifest["shards"]["train-000001.tar"]
    Path("raw/manifest.json").write_text(json.dumps(manifest))
    cache(denoiser)
    made = json.loads(Path("cached/manifest.json").read_text())
    assert made["left_out"] == 1
    assert [shard["samples"] for shard in made["shards"].values()] == [3, 2, 2]
    assert made["autoencoder_digest"] == compute_autoencoder_digest(denoiser)


def test_latents_of_another_size_or_autoencoder_are_refused(denoiser: Path) -> None:
    edits(Path("raw"))
    cache(denoiser)
    source = [{"path": "cached", "split": "train"}]
    with pytest.raises(DataError, match=r"are of pictures of 24 pixels, stage\.image_size is 32"):
        ShardDataModule(source, [], batch_size=2, image_size=32)
    assert ShardDataModule(source, [], batch_size=2, image_size=32, use_latents=False)
    data = ShardDataModule(source, [], batch_size=2, image_size=24)
    with pytest.raises(DataError, match="come from another autoencoder"):
        data.bind(lambda texts, images, **_: None, "0" * 64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["path=absent"], "path=absent isn't a folder of shards"),
        (["out=raw"], "out= must be another folder"),
        (["image_size=25"], "image_size=25: sides must be a multiple of 4"),
        (["dtype=int4"], "dtype must be one of float32"),
        (["denoiser=absent"], "denoiser=absent: no such folder"),
        (["rank=2", "world_size=2"], "rank=2 must be at least 0 and below world_size=2"),
    ],
)
def test_bad_input_is_named(
    arguments: list[str], words: str, denoiser: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edits(Path("raw"), 2)
    given = {"path": "raw", "out": "cached", "denoiser": str(denoiser), "image_size": "24"}
    given |= dict(argument.split("=") for argument in arguments)
    status, text = run_app("data_prep.cache_latents", capfd, *(f"{k}={v}" for k, v in given.items()))
    assert status == 1
    assert words in text


def test_the_application_caches(denoiser: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edits(Path("raw"), 2)
    options = ["path=raw", "out=cached", f"denoiser={denoiser}", "image_size=24", "device=cpu"]
    status, text = run_app("data_prep.cache_latents", capfd, *options)
    assert status == 0, text
    assert decode_sample(TarReader().read(Path("cached/train-000000.tar"), 0)).latents is not None

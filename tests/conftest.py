"""What the tests share: small models of the real classes, saved in the real formats, and a small shapes world."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no hub is asked; the libraries look at it when they are imported

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from data_prep.shapes.build import make_tokenizer
from data_prep.shapes.pretrain_autoencoder import pixels_of
from data_prep.shapes.pretrain_mllm import make_config
from data_prep.shapes.samples import World, write_benchmarks, write_training_sets
from tbac.app import plain
from tbac.models import UniImage
from tbac.models.autoencoder import FrozenAutoencoder
from tbac.models.weights import autoencoder_digest
from tests.helpers.configs import composed
from tests.helpers.worlds import SIZES, small_model


@pytest.fixture(autouse=True)
def _away_from_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a test writes lands in the repository."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shapes world with untrained backbones: backbones/{mllm,denoiser}, data/, benchmarks/."""
    folder = tmp_path_factory.mktemp("world")
    parts = plain(composed("train", "run_dir=.").model)["architecture"]
    torch.manual_seed(1)
    mllm, denoiser = folder / "backbones" / "mllm", folder / "backbones" / "denoiser"
    (folder / "tokenizer").mkdir()
    make_tokenizer(folder / "tokenizer", 0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "tokenizer")
    model = Qwen2_5_VLForConditionalGeneration._from_config(make_config(parts["mllm"], tokenizer))
    for part in (model, tokenizer, processor):
        part.save_pretrained(mllm)
    autoencoder = AutoencoderDC(**parts["autoencoder"])
    autoencoder.save_pretrained(denoiser / "vae")
    SanaTransformer2DModel(**parts["transformer"]).save_pretrained(denoiser / "transformer")
    scheduler = {k: v for k, v in parts["scheduler"].items() if k != "_class_name"}
    DPMSolverMultistepScheduler(**scheduler).save_pretrained(denoiser / "scheduler")
    world = World.draw(0, SIZES)
    write_benchmarks(world, folder / "benchmarks")
    frozen = FrozenAutoencoder(autoencoder)
    write_training_sets(
        world, folder / "data", lambda images: frozen.encode(pixels_of(images)), autoencoder_digest(denoiser)
    )
    return folder


@pytest.fixture
def in_world(world_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configs of the shapes world find that world."""
    monkeypatch.setenv("TBAC_SHAPES", str(world_folder))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    return world_folder


@pytest.fixture
def model(in_world: Path) -> UniImage:
    return small_model(in_world)

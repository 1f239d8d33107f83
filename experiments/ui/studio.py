"""What the page does, without the page: draws step by step, keeps pictures with recipes, opens a second model."""

import queue
import shlex
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from experiments.ui.ladder import draw_weighted
from tbac.app import open_model
from tbac.files import write_whole
from tbac.pictures import open_picture, to_upright_rgb
from tbac.sampling import UniImagePipeline
from tbac.sampling.latents import convert_to_pil
from tbac.sampling.recipe import Recipe, compute_fingerprint, save_picture

RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))  # width to height
PREVIEWS = 6  # of one picture
MAX_SEED = 2**31 - 1


class Progress(NamedTuple):
    """Where a drawing stands.

    Attributes:
        picture: a preview, or the finished picture.
        step: steps that are done.
        steps: of all.
        path: of the finished picture, None before.
    """

    picture: Image.Image
    step: int
    steps: int
    path: Path | None = None


class StoppedError(Exception):
    """The drawing isn't wanted any more."""


class Studio:
    """A model that draws for the page, and a folder for what it has drawn.

    Args:
        pipeline: of the model.
        checkpoint: where it was opened, for commands.
        folder: for pictures and inputs.
        options: how a further model is opened, as arguments of `open_model`.
    """

    def __init__(self, pipeline: UniImagePipeline, checkpoint: str, folder: Path, options: dict[str, Any]) -> None:
        self.pipeline, self.checkpoint, self.folder = pipeline, checkpoint, folder
        self.fingerprint = compute_fingerprint(pipeline.model)
        self._options = options
        self._others: dict[str, UniImagePipeline] = {}
        self._numbers = threading.Lock()

    def list_sizes(self) -> list[tuple[int, int]]:
        """List (width, height) in pixels of about the model's own area, in usual ratios."""
        model = self.pipeline.model
        step, side = model.size_multiple, model.denoiser.transformer.config.sample_size * model.autoencoder.compression
        sizes = []
        for across, down in RATIOS:
            width = max(1, round(side * (across / down) ** 0.5 / step)) * step
            height = max(1, round(side * (down / across) ** 0.5 / step)) * step
            sizes.append((width, height))
        return list(dict.fromkeys(sizes))

    def choose_size(self, image: Image.Image) -> tuple[int, int]:
        """Choose the size whose ratio is nearest to an image's."""
        ratio = image.width / image.height
        return min(self.list_sizes(), key=lambda size: abs(size[0] / size[1] / ratio - ratio / (size[0] / size[1])))

    def keep_input(self, image: Image.Image | str | Path) -> str:
        """Keep an input image, named by its pixels, and return its path."""
        picture = to_upright_rgb(image) if isinstance(image, Image.Image) else open_picture(image, "the input image")
        name = sha256(str(picture.size).encode() + picture.tobytes()).hexdigest()[:16]
        path = self.folder / "inputs" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            picture.save(path)
        return str(path)

    def draw(self, recipe: Recipe, weights: list[float] | None = None) -> Iterator[Progress]:
        """Draw one picture; yields previews, then the finished picture, which is kept with its recipe.

        Closing the iterator stops the drawing after the running step.

        Args:
            recipe: its `model` is filled in.
            weights: of the blocks' contexts; the picture then isn't kept, since no command draws it.

        Raises:
            ValueError: as a call of the pipeline.
        """
        recipe = replace(recipe, model=self.fingerprint)

        def run(callback: Callable[..., Any]) -> Image.Image:
            if weights is not None:
                return draw_weighted(self.pipeline, recipe, weights, callback)
            return draw_recipe(self.pipeline, recipe, callback)

        for progress in self._stream(run):
            if progress.step < progress.steps or weights is not None:
                yield progress
                continue
            yield Progress(progress.picture, progress.step, progress.steps, self._save(progress.picture, recipe))

    def _save(self, picture: Image.Image, recipe: Recipe) -> Path:
        with self._numbers:
            count = len(list(self.folder.glob("[0-9]*.png"))) if self.folder.is_dir() else 0
            path = self.folder / f"{count:05d}.png"
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, b"")  # the number is taken
        save_picture(picture, path, recipe)
        return path

    def _stream(self, run: Callable[[Callable[..., Any]], Image.Image]) -> Iterator[Progress]:
        """Run a drawing in a thread and yield what its callback sees."""
        events: queue.Queue[Progress | BaseException] = queue.Queue()
        stopped = threading.Event()

        def look(pipeline: UniImagePipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if stopped.is_set():
                raise StoppedError
            total = pipeline.num_timesteps
            if step + 1 < total and (step + 1) % max(1, total // PREVIEWS) == 0:
                pixels = (pipeline.model.autoencoder.decode(tensors["latents"]) + 1) / 2
                events.put(Progress(convert_to_pil(pixels)[0], step + 1, total))
            return {}

        def work() -> None:
            try:
                picture = run(look)
                events.put(Progress(picture, 1, 1))
            except BaseException as error:  # noqa: BLE001 (it is raised where the drawing is waited for)
                events.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while True:
                event = events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if event.step == event.steps:
                    return
        finally:
            stopped.set()
            thread.join()  # the model is free again for the next drawing

    def open_other(self, checkpoint: str) -> UniImagePipeline:
        """Open a second model, or return it if it is open."""
        if checkpoint not in self._others:
            self._others = {checkpoint: open_model(checkpoint, **self._options)}
        return self._others[checkpoint]

    def compare(
        self, checkpoint: str, prompts: list[str], recipe: Recipe
    ) -> Iterator[tuple[str, Image.Image, Image.Image]]:
        """Draw each prompt by both models from the same noise: prompt, picture, the other's picture."""
        other = self.open_other(checkpoint)
        for prompt in prompts:
            asked = replace(recipe, prompt=prompt)
            yield prompt, draw_recipe(self.pipeline, asked), draw_recipe(other, asked)

    def get_command(self, path: Path) -> str:
        """Return the command that draws a kept picture again, to the byte."""
        words = ["python", "experiments/generate.py", f"checkpoint={self.checkpoint}", f"from={path}"]
        return shlex.join(words)


def draw_recipe(pipeline: UniImagePipeline, recipe: Recipe, callback: Callable[..., Any] | None = None) -> Image.Image:
    """Draw what a recipe says."""
    images = [open_picture(path, "an input image of the picture") for path in recipe.images]
    made = pipeline(
        recipe.prompt,
        image=[images] if images else None,
        negative_prompt=recipe.negative_prompt,
        generator=[torch.Generator().manual_seed(recipe.seed)],
        callback_on_step_end=callback,
        **recipe.to_arguments(),
    )
    return made.images[0]

"""Pictures of fixed prompts from fixed noise, at every validation."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from tbac.distributed import hold_gathered
from tbac.files import describe_error, write_whole
from tbac.models import UniImage
from tbac.sampling.grid import encode_png, join_pictures
from tbac.sampling.pipeline import UniImagePipeline
from tbac.training.module import LadderTuningModule
from tbac.training.tracking import log_picture

log = logging.getLogger(__name__)
WIDTH = 320  # least pixels of a picture in the grid


class SampleGrid(L.Callback):
    """Writes `samples/step_<n>.png`, each picture above its prompt, and logs it as a picture of that step.

    Args:
        prompts: what to draw.
        folder: where the pictures go.
        guidance_scale: text guidance.
        num_inference_steps: solver steps.
        seed: of the noise.
        scale: enlargement of each picture; None enlarges small ones to about `WIDTH` pixels.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        folder: str,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 30,
        seed: int = 42,
        scale: int | None = None,
    ) -> None:
        self.prompts, self.folder = list(prompts), Path(folder)
        self.guidance_scale, self.num_inference_steps = guidance_scale, num_inference_steps
        self.seed, self.scale = seed, scale

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self.prompts:
            return
        assert isinstance(pl_module, LadderTuningModule)
        with hold_gathered(pl_module):
            self._draw(trainer, pl_module)

    @rank_zero_only
    def _draw(self, trainer: L.Trainer, pl_module: LadderTuningModule) -> None:
        path = self.folder / f"step_{pl_module.run_step:07d}.png"
        model = pl_module.model
        training = model.training
        # Whatever goes wrong with a picture, from a full disk to a full memory, isn't worth a run.
        try:
            drawn = self._draw_prompts(model)
            scale = self.scale or max(1, round(WIDTH / drawn[0].width))
            wrap = drawn[0].width * scale // 8  # letters of the captions are about 8 pixels wide
            columns = math.ceil(math.sqrt(len(drawn)))  # as high as it is wide, which the UI has room for
            grid = join_pictures(drawn, columns, scale=scale, captions=self.prompts, wrap=wrap, font_size=15)
            write_whole(path, encode_png(grid))
        except Exception as error:  # noqa: BLE001
            log.warning("the pictures %s are left out (%s); training goes on", path, describe_error(error))
            return
        finally:
            model.train(training)
        log_picture(trainer.loggers, path, "val/samples", pl_module.run_step)

    def _draw_prompts(self, model: UniImage) -> list[Image.Image]:
        pipeline = UniImagePipeline(model)
        pipeline.set_progress_bar_config(disable=True)
        drawn: list[Image.Image] = pipeline(
            self.prompts,
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.num_inference_steps,
            generator=torch.Generator().manual_seed(self.seed),
        ).images
        return drawn

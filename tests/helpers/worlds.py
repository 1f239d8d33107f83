"""A small shapes world and the small model in it."""

import os
from pathlib import Path

import torch
from hydra.utils import instantiate

from data_prep.shapes.samples import Sizes
from tbac.models import UniImage
from tests.helpers.configs import composed

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


def small_model(world: Path, *overrides: str) -> UniImage:
    """The shapes model on untrained backbones, with ladder weights far from zero so that they matter."""
    os.environ["TBAC_SHAPES"] = str(world)
    model = instantiate(composed("train", "run_dir=.", *overrides).model)
    torch.manual_seed(3)
    torch.nn.init.normal_(model.ladder.queries, std=0.5)
    return model


def read_everything(model: UniImage) -> UniImage:
    """The model with those parts read too that otherwise wait until they are used."""
    model.mllm.load_full_model()
    for part in ("encoder", "decoder"):
        model.autoencoder.part(part)
    return model

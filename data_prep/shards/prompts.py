"""Fills a prompt cache with the prompts of a stage, as they are and with their conditions dropped."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tbac.data.datamodule import ShardDataModule
from tbac.data.decoding import CorruptSampleError, decode_sample
from tbac.data.tars import TarReader
from tbac.data.transforms import ConditionDropout
from tbac.models.kept_prompts import PromptCache
from tbac.models.mllm import FrozenMLLM

log = logging.getLogger(__name__)
TELL_EVERY_S = 30.0


@dataclass(frozen=True)
class Place:
    """Where a sample lies.

    Attributes:
        tar: its shard.
        index: its number in the shard.
        training: whether its conditions are dropped now and then; False for validation.
    """

    tar: Path
    index: int
    training: bool


@dataclass
class Filled:
    """What was done.

    Attributes:
        samples: that were read.
        prompts: that training may make of them.
        computed: entries that weren't kept yet.
        corrupt: samples that can't be decoded.
    """

    samples: int = 0
    prompts: int = 0
    computed: int = 0
    corrupt: int = 0


def list_samples(data: ShardDataModule) -> list[Place]:
    """List the samples of a stage: all of its mixture, and those that validation takes."""
    reader = TarReader()
    places: list[Place] = []
    for training in (True, False):
        tars = dict.fromkeys(data.list_tars(validation=not training))  # a source may be named twice
        found = [Place(tar, i, training) for tar in tars for i in range(len(reader.read_index(tar).samples))]
        places += found if training else found[: data.val_samples]
    return places


def fill_prompt_cache(
    cache: PromptCache, mllm: FrozenMLLM, places: Sequence[Place], dropout: ConditionDropout | None
) -> Filled:
    """Compute and keep what the cache lacks.

    Args:
        cache: of the model that will train.
        mllm: of the same model.
        places: the samples.
        dropout: of training; what it may make of a sample is kept, too.
    """
    reader, filled = TarReader(), Filled()
    told = time.monotonic()
    for place in places:
        try:
            sample = decode_sample(reader.read(place.tar, place.index))
        except (CorruptSampleError, OSError) as error:
            log.warning("left out sample %d of %s: %s", place.index, place.tar, error)
            filled.corrupt += 1
            continue
        outcomes = [sample]
        if dropout is not None and place.training:
            outcomes = dropout.list_outcomes(sample)
        for outcome in outcomes:
            inputs = cache([outcome.text], [outcome.sources or None])
            if "waiting" in inputs:
                cache.complete(inputs, mllm)
        filled.samples, filled.prompts = filled.samples + 1, filled.prompts + len(outcomes)
        if time.monotonic() > told + TELL_EVERY_S:
            told = time.monotonic()
            log.info("%d of %d samples, %d entries computed", filled.samples, len(places), cache.computed)
    filled.computed = cache.computed
    return filled

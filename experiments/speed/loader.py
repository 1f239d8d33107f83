"""The data loader against the plain cost of reading and decoding the same pictures with the same workers."""

import io
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

from data_prep.shapes.parts import make_tokenizer
from data_prep.shards.writer import write_shards
from experiments.reports import format_table
from experiments.speed.measure import MIB, in_child, interleaved, summary
from tbac.data.datamodule import ShardDataModule
from tbac.data.tars import TarReader
from tbac.data.transforms import ConditionDropout
from tbac.models.prompt import PromptProcessor
from tbac.pictures import IMAGE_FORMATS

PLAIN, PILLOW = "read + decode alone", "read + decode + crop by Pillow, to floats"
OURS, REDUCED, BUCKETS = "ours", "ours, reducing_gap=1", "ours, buckets"
WORDS = "a photo of the old harbour at dusk with three red boats and many people who wait for a ship near tall houses"
Place = tuple[Path, int]


def photograph(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """(width, height) pixels that compress about as photographs do: smooth, with fine detail."""
    coarse = rng.integers(0, 256, (size[1] // 32 + 1, size[0] // 32 + 1, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8))


def write_pictures(folder: Path, cfg: dict[str, Any]) -> None:
    """Two sources of JPEGs of several shapes with captions of some forty words."""
    rng, words = np.random.default_rng(0), WORDS.split()
    for source, count in (("a", cfg["samples"] * 3 // 4), ("b", cfg["samples"] // 4)):
        samples = (
            (
                f"{source}{i:06d}",
                {
                    "jpg": photograph(tuple(cfg["pictures"][i % len(cfg["pictures"])]), rng),
                    "txt": " ".join(rng.choice(words, 40)),
                },
            )
            for i in range(count)
        )
        write_shards(folder / source, "train", samples, 64)


def prompt_of(folder: Path) -> PromptProcessor:
    """Real prompt code with a small vocabulary."""
    make_tokenizer(folder, 0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return PromptProcessor(tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder), image_pixels=200704)


def module_of(folder: Path, prompt: PromptProcessor, cfg: dict[str, Any], **options: Any) -> ShardDataModule:
    """A training mixture, shuffled, with condition dropout."""
    data = ShardDataModule(
        [{"path": str(folder / name), "weight": weight} for name, weight in (("a", 3.0), ("b", 1.0))],
        [],
        batch_size=cfg["batch"],
        image_size=cfg["image_size"],
        dropout=ConditionDropout(0.1),
        shuffle_buffer=200,
        num_workers=cfg["workers"],
        **options,
    )
    data.bind(prompt)
    return data


class PlainPictures(Dataset[Any]):
    """Batches of pictures without anything else.

    Args:
        places: tar and number of each picture.
        image_size: pixels a side that they are cropped to, as tensors of floats; None decodes them and gives nothing.
    """

    def __init__(self, places: list[Place], image_size: int | None = None) -> None:
        self.places, self.image_size, self.tars = places, image_size, TarReader()

    def __getitem__(self, batch: list[int]) -> Tensor:
        pictures = [self._picture(*self.places[i % len(self.places)]) for i in batch]
        return torch.stack(pictures) if self.image_size else torch.empty(0)

    def _picture(self, path: Path, sample: int) -> Tensor:
        data = io.BytesIO(self.tars.read(path, sample)["jpg"])
        with Image.open(data, formats=IMAGE_FORMATS) as opened:
            image = opened.convert("RGB")
        if not (size := self.image_size):
            return torch.empty(0)
        fitted = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def _endless(batch: int) -> Iterator[list[int]]:
    for start in itertools.count(step=batch):
        yield list(range(start, start + batch))


def _sides(folder: Path, prompt: PromptProcessor, cfg: dict[str, Any]) -> dict[str, Any]:
    """Per side something that gives a fresh loader."""
    tars, reader = sorted(folder.glob("*/*.tar")), TarReader()
    places = [(tar, i) for tar in tars for i in range(len(reader.read_index(tar).samples))]
    reader.close()
    workers = cfg["workers"]

    def plain(image_size: int | None = None) -> DataLoader:
        return DataLoader(
            PlainPictures(places, image_size),
            sampler=_endless(cfg["batch"]),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )

    return {
        PLAIN: plain,
        PILLOW: partial(plain, cfg["image_size"]),
        OURS: module_of(folder, prompt, cfg).train_dataloader,
        REDUCED: module_of(folder, prompt, cfg, reducing_gap=1.0).train_dataloader,
        BUCKETS: module_of(folder, prompt, cfg, buckets="sana").train_dataloader,
    }


def order_cost(data: ShardDataModule, samples: int) -> float:
    """Seconds a sample that choosing takes: shuffling, mixture and, where there are any, buckets."""
    started = time.process_time()
    plans = iter(data.train_dataloader().sampler)
    for _ in range(samples // data.batch_size):
        next(plans)
    return (time.process_time() - started) / samples


def measure(cfg: dict[str, Any]) -> dict[str, Any]:
    """Throughput of all sides, in turns, and the share of choosing samples."""
    options = cfg["loader"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder, options)
        prompt = prompt_of(folder / "tokenizer")
        sides = _sides(folder, prompt, options)

        def run(side: str) -> None:
            batches = iter(sides[side]())
            for _ in range(options["batches"]):
                next(batches)

        runs = {side: (lambda s=side: run(s)) for side in sides}
        seconds = interleaved(runs, options["repeats"], torch.device("cpu"))
        found = summary(seconds, PLAIN, OURS)
        drawn = options["batches"] * options["batch"]
        found["samples_per_s"] = {side: round(drawn / s, 1) for side, s in found["median_s"].items()}
        chosen = {
            side: statistics.median(
                order_cost(module_of(folder, prompt, options, buckets=buckets), drawn) for _ in range(3)
            )
            for side, buckets in ((OURS, None), (BUCKETS, "sana"))
        }
        found["choosing_share"] = {side: s * drawn / found["median_s"][side] for side, s in chosen.items()}
    return found


def memory_of_loading(samples: int, workers: int, batch: int = 50) -> dict[str, list[float]]:
    """MiB of this process and its workers after each tenth of the samples.

    Args:
        samples: how many are read.
        workers: loader processes.
        batch: samples of a batch.
    """
    options = {"samples": 2000, "pictures": [[64, 64], [96, 64]], "batch": batch, "image_size": 64, "workers": workers}
    count = samples // batch
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder, options)
        data = module_of(folder, prompt_of(folder / "tokenizer"), options, buckets="sana")
        batches = iter(data.train_dataloader())
        used: dict[str, list[float]] = {"samples": [], "mib": []}
        for number, taken in enumerate(itertools.islice(batches, count), 1):
            data.on_before_batch_transfer(taken, 0)
            if number % (count // 10) == 0:
                processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
                used["samples"].append(data.position)
                used["mib"].append(round(sum(_proportional(pid) for pid in processes if pid) / MIB, 1))
    return used


def _proportional(pid: int) -> int:
    """Bytes of a process without program files; shared pages are divided among those that share them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def bench_loader(cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Throughput, the share of choosing samples, and memory over many samples."""
    options = cfg["loader"]
    found = measure(cfg)
    memory = in_child(memory_of_loading, options["memory_samples"], options["workers"])
    rates, shares = found["samples_per_s"], found["choosing_share"]
    rows = [
        [side, f"{rate:.1f}", *(f"{rate / rates[b]:.2f}" for b in (PLAIN, PILLOW)), *_percent(shares.get(side))]
        for side, rate in rates.items()
    ]
    header = ["loader", "samples a second", "to decoding alone", "to Pillow's crop", "shuffle, mixture, buckets"]
    first, last = memory["mib"][0], memory["mib"][-1]
    text = (
        f"Memory of all processes after {memory['samples'][0]:,} samples {first:,.0f} MiB, after "
        f"{memory['samples'][-1]:,} {last:,.0f} MiB."
    )
    return {**found, "memory": memory, "table": f"{format_table(header, rows)}\n\n{text}"}


def _percent(share: float | None) -> list[str]:
    return [""] if share is None else [f"{100 * share:.1f} %"]

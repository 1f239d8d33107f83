"""A training step whose prompts run through the MLLM against one that reads what a prompt cache has kept of them."""

import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from experiments.costs import Case, count_sample_flops, make_inputs
from experiments.reports import format_table
from experiments.speed.measure import MIB, Memory, in_child, interleaved, status, summary
from experiments.speed.training import OURS, Side, autocast, make_model, targets
from tbac.models import UniImage
from tbac.models.kept import FileStore, MemoryStore
from tbac.models.kept_prompts import FEATURES, GRID, KeptPrompts, PromptCache
from tbac.models.prompt import PromptInputs

RUN, MEMORY, FILES, IMAGES = "prompts run", "kept in memory", "kept in files", "images kept in files"
LIMIT = 1e-5  # relative difference of losses in float32
LARGEST = 2**40  # bytes that a store may hold: all


class NumberedPrompts:
    """Prompt code for a model without a tokenizer: the text is a number, and the prompt is random but for that.

    Args:
        model: that reads the prompts.
        case: how long they are, and the size of their image.
        shared: how many tokens all prompts begin with.
    """

    system_prompt = ""

    def __init__(self, model: UniImage, case: Case, shared: int) -> None:
        self.model, self.case, self.shared = model, replace(case, batch=1), shared
        self.first = self.make_one("0")

    def make_one(self, text: str) -> PromptInputs:
        """One prompt; what all begin with is that of prompt 0."""
        inputs = make_inputs(self.model, self.case, self.shared, seed=int(text))
        first = inputs if text == "0" else self.first
        inputs["input_ids"][:, : self.shared] = first["input_ids"][:, : self.shared]
        inputs["shared_ids"] = first["shared_ids"]
        return inputs

    def __call__(self, texts: Sequence[str], *_: Any, **__: Any) -> PromptInputs:
        ones = [self.make_one(text) for text in texts]
        joined: dict[str, Tensor] = {}
        for name in ones[0]:
            axis = 1 if name == "position_ids" else 0
            joined[name] = torch.cat([one[name] for one in ones], dim=axis)
        return PromptInputs({**joined, "shared_ids": self.first["shared_ids"]})

    def find_shared_ids(self, system: str) -> tuple[int, ...]:
        return tuple(self.first["shared_ids"].tolist())

    def make_references(self, *_: Any) -> dict[str, Tensor]:
        return {}


class KeptSteps:
    """Steps on a few batches, again and again.

    Args:
        model: trains.
        case: its prompts.
        cfg: of the benchmark.
        folder: of kept prompts and features.
    """

    def __init__(self, model: UniImage, case: Case, cfg: dict[str, Any], folder: Path) -> None:
        self.model, self.case, self.cfg = model, case, cfg
        self.side = Side(OURS, model, cfg)
        self.targets = targets(model, case.batch, cfg["latent_side"])
        prompt: Any = NumberedPrompts(model, case, cfg["shared_tokens"])
        self.prompt = prompt
        numbers = [str(number) for number in range(cfg["prompt_cache"]["batches"] * case.batch)]
        self.texts = [numbers[first : first + case.batch] for first in range(0, len(numbers), case.batch)]
        self.made = [prompt(texts) for texts in self.texts]
        layers, depth = model.ladder.prompt_layers, model.ladder.plan.deepest
        self.features = FileStore(folder / "images", LARGEST)
        self.caches: dict[str, PromptCache] = {
            MEMORY: KeptPrompts(prompt, MemoryStore(LARGEST), "bench", depth, layers),
            FILES: KeptPrompts(prompt, FileStore(folder / "prompts", LARGEST), "bench", depth, layers),
        }

    def name_sides(self) -> list[str]:
        """The ways to be measured: only prompts with images have features."""
        return [RUN, MEMORY, FILES, *([IMAGES] if self.case.side else [])]

    def load(self, name: str, batch: int) -> PromptInputs:
        """What the loader hands to a step; of the side `RUN` it is there already."""
        made, texts = self.made[batch], self.texts[batch]
        if name in self.caches:
            self.model.prompt_cache = self.caches[name]
            return self.caches[name](texts)
        if name == RUN:
            return made
        features = []
        for place, text in enumerate(texts):
            key = text.zfill(64)
            entry = self.features.read(key)
            if entry is None:
                pixels, grid = (made[part].chunk(len(texts))[place] for part in ("pixel_values", "image_grid_thw"))
                with torch.no_grad(), autocast(self.cfg, self.model.device):
                    entry = {FEATURES: self.model.mllm.encode_images(pixels, grid), GRID: grid}
                self.features.write(key, entry)
            features.append(entry[FEATURES])
        inputs = {part: value for part, value in made.items() if part != "pixel_values"}
        return PromptInputs({**inputs, "image_features": torch.cat(features)})

    def compute_losses(self, name: str) -> list[float]:
        """Losses of all batches; the first time, a cache is filled."""
        with torch.no_grad():
            batches = range(len(self.texts))
            return [self.side.loss(self.load(name, batch), *self.targets).item() for batch in batches]

    def step(self, name: str, batch: int) -> None:
        """A step, and what loading takes, which in training a loader process does meanwhile."""
        self.side.step(self.load(name, batch), *self.targets)


def list_cases(cfg: dict[str, Any]) -> list[Case]:
    """Text alone, and text with an image, which fills three quarters of its prompt."""
    options = cfg["prompt_cache"]
    side = int((0.75 * options["image_tokens"]) ** 0.5)
    return [
        Case("text", options["text_tokens"], options["batch"]),
        Case("image + text", options["image_tokens"], options["batch"], side),
    ]


def measure_memory(name: str, cfg: dict[str, Any], device: str, case: Case, folder: Path) -> dict[str, float]:
    """Peak memory of steps in a process of their own, and what it holds after a few and after many of them."""
    memory = Memory(torch.device(device))
    steps = KeptSteps(make_model(cfg["model"], device), case, cfg, folder)
    gc.collect()
    memory.begin()
    held = []
    for step in range(3 * cfg["prompt_cache"]["batches"]):
        steps.step(name, step % len(steps.texts))
        held.append(round((status("VmRSS") - memory.before) / MIB, 1))
    return {**memory.end(), "after_one_pass_mib": held[len(steps.texts) - 1], "after_three_mib": held[-1]}


def bench_prompt_cache(cfg: dict[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """Seconds and memory of a step, with prompts that run and with kept ones, after their losses were found equal.

    What was found is given anew after each case.

    Raises:
        RuntimeError: when they aren't.
    """
    cases: dict[str, Any] = {}
    for case in list_cases(cfg):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            steps = KeptSteps(make_model(cfg["model"], device.type), case, cfg, folder)
            losses = {name: steps.compute_losses(name) for name in steps.name_sides()}
            difference = _compare(losses, cfg)
            # Each side goes through its batches in turn; reading files is measured apart, too.
            turn = dict.fromkeys(steps.name_sides(), 0)

            def step(name: str, steps: KeptSteps = steps, turn: dict[str, int] = turn) -> None:
                steps.step(name, turn[name] % len(steps.texts))
                turn[name] += 1

            runs = {name: (lambda n=name, run=step: run(n)) for name in steps.name_sides()}
            found = summary(interleaved(runs, cfg["repeats"], device), RUN, FILES)
            found |= {"difference": difference, "read_s": _time_reading(steps), "kept_mib": _count_mib(steps, folder)}
            del steps, step, runs
            gc.collect()
            memory = {name: in_child(measure_memory, name, cfg, device.type, case, folder) for name in (RUN, FILES)}
        flops = count_sample_flops(cfg["model"], case, cfg["latent_side"])
        found["saved_share"] = (flops["prefix"] + flops["vision"]) / sum(flops.values())
        cases[f"{case.name}, {case.tokens}"] = found | {"memory": memory, "batch": case.batch}
        ratios = [f"{label} {values['ratio']:.2f}" for label, values in cases.items()]
        line = "prompts run / kept in files: " + "; ".join(ratios)
        yield {"cases": cases, "table": _make_tables(cases), "line": line}


def _compare(losses: dict[str, list[float]], cfg: dict[str, Any]) -> float:
    """The largest relative difference of losses to those of prompts that run."""
    expected = torch.tensor(losses[RUN], dtype=torch.float64)
    others = [torch.tensor(values, dtype=torch.float64) for values in losses.values()]
    difference = max(((values - expected).abs() / expected).max().item() for values in others)
    if cfg["precision"] != "bf16-mixed" and difference > LIMIT:
        raise RuntimeError(f"the losses of kept prompts aren't those of prompts that run: {losses}")
    return difference


def _time_reading(steps: KeptSteps) -> float:
    """Median seconds of reading and joining a batch of kept prompts."""
    seconds = []
    for batch in range(len(steps.texts)):
        started = time.perf_counter()
        steps.load(FILES, batch)
        seconds.append(time.perf_counter() - started)
    return round(median(seconds), 4)


def _count_mib(steps: KeptSteps, folder: Path) -> dict[str, float]:
    """MiB of one prompt, and of the features of its image, in files."""
    count = sum(map(len, steps.texts))
    sizes = {
        name: sum(f.stat().st_size for f in (folder / name).rglob("*.safetensors")) for name in ("prompts", "images")
    }
    return {name: round(size / count / MIB, 3) for name, size in sizes.items()}


def _make_tables(cases: dict[str, Any]) -> str:
    """One row for each case and way: seconds, ratio, memory; then what it costs."""
    rows, costs = [], []
    for label, found in cases.items():
        medians, memory = found["median_s"], found["memory"]
        for name, seconds in medians.items():
            held = ["", "", ""]
            if name in memory:
                held = [f"{memory[name][part]:,.0f}" for part in ("peak_mib", "after_one_pass_mib", "after_three_mib")]
            rows.append([label, found["batch"], name, f"{seconds:.3f}", f"{medians[RUN] / seconds:.2f}", *held])
        kept, reading = found["kept_mib"], found["read_s"]
        rate = kept["prompts"] * found["batch"] / medians[FILES]
        costs.append(
            [label, f"{kept['prompts']:.2f}", f"{kept['images']:.2f}", f"{1000 * reading:.0f}", f"{rate:,.0f}",
             f"{100 * found['saved_share']:.0f} %", f"{found['difference']:.1e}"]
        )  # fmt: skip
    header = [
        "prompt, tokens",
        "batch",
        "side",
        "seconds a step",
        "ratio",
        "peak, MiB",
        "after one pass",
        "after three",
    ]
    cost_header = ["prompt, tokens", "MiB a prompt", "MiB of its features", "ms to read a batch", "MiB read a second"]
    cost_header += ["share of FLOPs saved", "difference of losses"]
    return format_table(header, rows) + "\n\n" + format_table(cost_header, costs)

"""Probes: what can be read linearly from each layer of an MLLM.

A linear classifier is fitted for each layer and concept on the mean of a caption's states (Alain and Bengio 2016, arXiv
1610.01644): ridge regression on the classes, with the penalty that leaves one out best. What it gets right of captions
that it hasn't seen says what a connector finds at that layer. Two kinds of states are probed: those of the queries,
which a ladder reads, and those of the prompt's own tokens, which it reads too with `ladder.prompt_context`.

Each token is divided by its root mean square before the mean is taken, as with `ladder.tap_norm=rms`, so that no layer
counts for more because its numbers are larger.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from tbac.evaluation.captions import LabelledCaption, list_concepts
from tbac.models import UniImage
from tbac.models.ladder import normalize_states
from tbac.models.taps import TapPlan

SOURCES = ("queries", "prompt")
TESTED = ("seen", "unseen")
PENALTIES = np.logspace(-1, 5, 13)
LEAST_GAIN = 0.01  # in mean accuracy, for which one more layer is joined


@torch.no_grad()
def read_states(model: UniImage, texts: Sequence[str], batch_size: int = 32) -> dict[str, np.ndarray]:
    """Read the mean state of each caption at every layer, from its queries and from its own tokens.

    Args:
        model: any; layers above its deepest tap are read first where they aren't in memory.
        texts: captions.
        batch_size: how many run at once.

    Returns:
        `queries` and `prompt`: (layer, caption, hidden) in float32, for layers 0 (embeddings) to the final state.
    """
    model.mllm.load_full_model()
    layers = range(model.mllm.num_layers + 1)
    found: dict[str, list[Tensor]] = {source: [] for source in SOURCES}
    for start in range(0, len(texts), batch_size):
        inputs = model.prompt(list(texts[start : start + batch_size])).to(model.device)
        prefix = model.mllm.read_prefix(inputs, layers[-1], layers)
        assert prefix.states is not None
        assert prefix.states_mask is not None
        queries = model.mllm.read_queries(model.ladder.queries, prefix, layers)
        found["queries"].append(normalize_states(queries.float(), "rms").mean(dim=2).cpu())
        # Padding is left out of the mean over the prompt's own tokens.
        weights = prefix.states_mask[None, :, :, None].float()
        prompt = (normalize_states(prefix.states.float(), "rms") * weights).sum(dim=2) / weights.sum(dim=2)
        found["prompt"].append(prompt.cpu())
    return {source: torch.cat(states, dim=1).numpy() for source, states in found.items()}


@dataclass(frozen=True)
class Task:
    """A concept to be read, in one set of captions.

    Attributes:
        concept: its name.
        labels: class of each caption that is learnt from or tested.
        train: places of the captions to learn from.
        tests: set of captions (`seen`, `unseen`) -> places of those to be tested.
    """

    concept: str
    labels: np.ndarray
    train: np.ndarray
    tests: Mapping[str, np.ndarray]

    def measure(self, features: np.ndarray) -> dict[str, float]:
        """Fit on features (caption, channel), and measure the accuracy in each tested set.

        A class counts as much as any other, however many captions it has, so that guessing gives one over their number.
        """
        classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=PENALTIES, class_weight="balanced"))
        classifier.fit(features[self.train], self.labels[self.train])
        accuracies = {}
        for name, places in self.tests.items():
            right = classifier.predict(features[places]) == self.labels[places]
            classes = np.unique(self.labels[places])
            accuracies[name] = float(np.mean([right[self.labels[places] == one].mean() for one in classes]))
        return accuracies


def make_tasks(captions: Sequence[LabelledCaption], half: int | None = None) -> list[Task]:
    """Make a task for each concept of some captions.

    Args:
        captions: with labels.
        half: 0 or 1 tests only every second caption of each set: a choice that is made on one half is measured on the
            other. None tests all.

    Raises:
        ValueError: as `list_concepts` does.
    """
    tasks = []
    for concept in list_concepts(captions):
        labels = np.array([caption.labels.get(concept, "") for caption in captions])
        places: dict[str, list[int]] = {split: [] for split in ("train", *TESTED)}
        for index, caption in enumerate(captions):
            if concept in caption.labels:
                places[caption.split].append(index)
        if half is not None:
            places |= {name: places[name][half::2] for name in TESTED}
        tests = {name: np.array(places[name]) for name in TESTED if places[name]}
        tasks.append(Task(concept, labels, np.array(places["train"]), tests))
    return tasks


def probe_layers(states: np.ndarray, tasks: Sequence[Task]) -> dict[str, dict[str, list[float]]]:
    """Measure how well each concept can be read from each layer.

    Args:
        states: (layer, caption, hidden).
        tasks: the concepts.

    Returns:
        Tested set -> concept -> accuracy at each layer.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for task in tasks:
        for features in states:
            for name, accuracy in task.measure(features).items():
                found.setdefault(name, {}).setdefault(task.concept, []).append(accuracy)
    return found


def measure_mean(features: np.ndarray, tasks: Sequence[Task]) -> float:
    """Measure the mean accuracy over concepts: in captions of unseen words where a concept has them, else of seen."""
    accuracies = []
    for task in tasks:
        measured = task.measure(features)
        accuracies.append(measured.get("unseen", measured.get("seen", 0.0)))
    return float(np.mean(accuracies))


def join(states: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """Join layers along channels: (layer, caption, hidden) -> (caption, number of layers * hidden)."""
    return np.concatenate([states[layer] for layer in layers], axis=-1)


def choose_layers(states: np.ndarray, tasks: Sequence[Task], most: int = 3) -> list[int]:
    """Choose the layers that together tell most: the best one, then whichever adds most, while it adds enough.

    Args:
        states: (layer, caption, hidden); layer 0, the embeddings, isn't chosen.
        tasks: the concepts; the choice is made by their tested captions, so what it is worth has to be measured on
            others.
        most: how many layers at most.

    Returns:
        The layers, ascending.
    """
    chosen: list[int] = []
    best = 0.0
    while len(chosen) < most:
        candidates = [layer for layer in range(1, len(states)) if layer not in chosen]
        worth = {layer: measure_mean(join(states, [*chosen, layer]), tasks) for layer in candidates}
        if not worth:
            break
        # Of equals the deepest is taken: a state says more of its prompt the deeper it lies.
        layer = max(candidates, key=lambda candidate: (worth[candidate], candidate))
        if chosen and worth[layer] < best + LEAST_GAIN:
            break
        chosen.append(layer)
        best = worth[layer]
    return sorted(chosen)


def forecast(states: np.ndarray, plan: TapPlan, measure: Callable[[np.ndarray], float]) -> float:
    """Forecast what a tap plan is worth: the mean over blocks of what can be read of that which the block reads.

    A mix is taken as it begins, as the mean of its layers.

    Args:
        states: (layer, caption, hidden).
        plan: the taps.
        measure: gives the worth of features (caption, channel), such as their mean accuracy.
    """
    worth: dict[tuple[int, ...], float] = {}
    readings = plan.list_readings()
    for reading in set(readings):
        layers = [plan.layers[position] for position in reading]
        mixed = plan.mixed and len(layers) > 1
        features = states[layers].mean(axis=0) if mixed else join(states, list(dict.fromkeys(layers)))
        worth[reading] = measure(features)
    return float(np.mean([worth[reading] for reading in readings]))


def recommend(layers: Sequence[int], num_layers: int) -> str:
    """Name the tap rule that reads these layers, as overrides of a command."""
    if list(layers) == [num_layers]:
        return "taps=final"
    if len(layers) == 1:
        return f"taps=single taps.layer={layers[0]}"
    return f"taps=bundle 'taps.layers=[{','.join(map(str, layers))}]' ladder.tap_norm=rms"

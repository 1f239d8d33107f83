"""Probes: what can be read linearly from each layer of an MLLM.

A linear classifier is fitted for each layer and concept on the mean of a caption's states (Alain and Bengio 2016, arXiv
1610.01644): ridge regression on the classes, with the penalty that leaves one out best. What it gets right of captions
that it hasn't seen says what a connector finds at that layer. Two kinds of states are probed: those of the queries,
which a ladder reads, and those of the prompt's own tokens, which it reads too with `ladder.prompt_context`.

Each token is divided by its root mean square before the mean is taken, as with `ladder.tap_norm=rms`, so that no layer
counts for more because its numbers are larger.
"""

from collections.abc import Mapping, Sequence
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
    """A concept to be read.

    Attributes:
        concept: its name.
        labels: class of each caption; of those that say nothing about the concept, nothing.
        train: places of the captions to learn from.
        tests: set of captions (`seen`, `unseen`) -> places of those to be tested.
    """

    concept: str
    labels: np.ndarray
    train: np.ndarray
    tests: Mapping[str, np.ndarray]

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Fit on features (caption, channel), and predict the class of every caption.

        A class counts as much as any other, however many captions it has.
        """
        classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=PENALTIES, class_weight="balanced"))
        classifier.fit(features[self.train], self.labels[self.train])
        return classifier.predict(features)

    def measure(self, predicted: np.ndarray, half: int | None = None) -> dict[str, float]:
        """Measure the accuracy in each tested set: the mean over classes, so that guessing gives one over their number.

        Args:
            predicted: class of each caption.
            half: 0 or 1 looks at every second caption of each set: a choice that is made by one half is measured by the
                other. None looks at all.
        """
        accuracies = {}
        for name, tested in self.tests.items():
            places = tested if half is None else tested[half::2]
            right = predicted[places] == self.labels[places]
            by_class = [right[self.labels[places] == one].mean() for one in np.unique(self.labels[places])]
            accuracies[name] = float(np.mean(by_class)) if by_class else float("nan")
        return accuracies


def make_tasks(captions: Sequence[LabelledCaption]) -> list[Task]:
    """Make a task for each concept of some captions.

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
        tests = {name: np.array(places[name]) for name in TESTED if places[name]}
        tasks.append(Task(concept, labels, np.array(places["train"]), tests))
    return tasks


class Probe:
    """Measures what can be read from layers, and fits each set of layers only once.

    Args:
        states: (layer, caption, hidden), of layers 0 (embeddings) to the final state.
        tasks: the concepts.
    """

    def __init__(self, states: np.ndarray, tasks: Sequence[Task]) -> None:
        self.states, self.tasks = states, tasks
        self._predicted: dict[tuple[tuple[int, ...], bool], list[np.ndarray]] = {}

    def _predict(self, layers: Sequence[int], mixed: bool) -> list[np.ndarray]:
        """Predict each concept of all captions from layers that are joined along channels, or from their mean."""
        key = tuple(sorted(set(layers))), mixed
        if key not in self._predicted:
            read = [self.states[layer] for layer in key[0]]
            features = np.mean(read, axis=0) if mixed else np.concatenate(read, axis=-1)
            self._predicted[key] = [task.predict(features) for task in self.tasks]
        return self._predicted[key]

    def measure(
        self, layers: Sequence[int], mixed: bool = False, half: int | None = None
    ) -> dict[str, dict[str, float]]:
        """Measure how well each concept can be read: concept -> tested set -> accuracy; `half` as in `Task.measure`."""
        predicted = zip(self.tasks, self._predict(layers, mixed), strict=True)
        return {task.concept: task.measure(classes, half) for task, classes in predicted}

    def measure_mean(self, layers: Sequence[int], mixed: bool = False, half: int | None = None) -> float:
        """Measure the mean accuracy over concepts: in unseen words where a concept has them, else in seen ones."""
        by_concept = self.measure(layers, mixed, half).values()
        return float(np.nanmean([tested.get("unseen", tested.get("seen", np.nan)) for tested in by_concept]))

    def measure_layers(self) -> dict[str, dict[str, list[float]]]:
        """Measure every layer by itself: tested set -> concept -> accuracy at each layer."""
        found: dict[str, dict[str, list[float]]] = {}
        for layer in range(len(self.states)):
            for concept, tested in self.measure([layer]).items():
                for name, accuracy in tested.items():
                    found.setdefault(name, {}).setdefault(concept, []).append(accuracy)
        return found

    def choose_layers(self, most: int = 3, half: int | None = 0) -> list[int]:
        """Choose the layers that together tell most: the best one, then whichever adds most, while it adds enough.

        Args:
            most: how many layers at most; layer 0, the embeddings, isn't among them.
            half: of the tested captions, by which they are chosen.

        Returns:
            The layers, ascending.
        """
        chosen: list[int] = []
        best = 0.0
        while len(chosen) < most:
            candidates = [layer for layer in range(1, len(self.states)) if layer not in chosen]
            worth = {layer: self.measure_mean([*chosen, layer], half=half) for layer in candidates}
            if not worth:
                break
            # Of equals the deepest is taken: a state says more of its prompt the deeper it lies.
            layer = max(candidates, key=lambda candidate: (worth[candidate], candidate))
            if chosen and worth[layer] < best + LEAST_GAIN:
                break
            chosen.append(layer)
            best = worth[layer]
        return sorted(chosen)

    def forecast(self, plan: TapPlan, half: int | None = 1) -> float:
        """Forecast what a tap plan is worth: the mean over blocks of what can be read of that which the block reads.

        A mix is taken as it begins, as the mean of its layers.

        Args:
            plan: the taps.
            half: of the tested captions, by which it is measured.
        """
        worth = []
        for reading in plan.list_readings():
            layers = [plan.layers[position] for position in reading]
            worth.append(self.measure_mean(layers, plan.mixed and len(layers) > 1, half))
        return float(np.mean(worth))


def recommend(layers: Sequence[int], num_layers: int) -> str:
    """Name the tap rule that reads these layers, as overrides of a command."""
    if list(layers) == [num_layers]:
        return "taps=final"
    if len(layers) == 1:
        return f"taps=single taps.layer={layers[0]}"
    return f"taps=bundle 'taps.layers=[{','.join(map(str, layers))}]' ladder.tap_norm=rms"

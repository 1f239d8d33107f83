"""Which layer of an MLLM holds what, and which taps follow from that; minutes, not a sweep.

python experiments/probe.py world=shapes
python experiments/probe.py world=real captions.path=my_captions.csv
"""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.reports import format_table
from tbac.app import command, compose_checked, get_run_folder, make_part, open_model, pick_device

if TYPE_CHECKING:
    from tbac.models import UniImage
    from tbac.models.config import ModelConfig


def compose_rule(rule: str, overrides: Sequence[str]) -> "ModelConfig":
    """Compose the model's options with a tap rule, given as on a command line after `taps=`."""
    cfg = compose_checked("probe", [*overrides, *shlex.split(f"taps={rule}")])
    return make_part(cfg.model, "model")


def compose_rules(cfg: DictConfig) -> "dict[str, ModelConfig]":
    """Compose the model's options with each of the tap rules to be forecast, and check that the rules fit its sizes.

    Raises:
        ValueError: for a rule that isn't known or doesn't fit; of a checkpoint's model that is seen once it is open.
    """
    from tbac.models.architecture import check_config, read_architecture
    from tbac.models.taps import resolve_taps

    given = [override for override in HydraConfig.get().overrides.task if not override.startswith(("taps", "rules"))]
    composed = {rule: compose_rule(rule, given) for rule in cfg.rules}
    if cfg.checkpoint is None:
        config = make_part(cfg.model, "model")
        check_config(config)
        parts = read_architecture(config)
        for one in composed.values():
            resolve_taps(one.taps, parts.num_layers, parts.num_blocks)
    return composed


def open_probed(cfg: DictConfig) -> "UniImage":
    """Open the checkpoint's model, or the world's as training begins with it."""
    from tbac.models import UniImage

    if cfg.checkpoint is not None:
        return open_model(cfg.checkpoint, cfg.device, mllm=cfg.mllm, denoiser=cfg.denoiser).model
    return UniImage.from_config(make_part(cfg.model, "model")).to(pick_device(cfg.device)).requires_grad_(False)


def measure(cfg: DictConfig) -> dict[str, Any]:
    """Probe every layer, choose taps, and forecast what rules are worth.

    Returns:
        `accuracy` (states of -> tested set -> concept -> value at each layer), `chance` (concept -> value),
        `recommended` (states of -> layers, overrides, accuracy of both these and the final state), `forecast` (rule ->
        states of -> accuracy), and the numbers of captions.
    """
    from tbac.evaluation.probing import Probe, make_tasks, read_states, recommend
    from tbac.models.taps import resolve_taps

    # What the user gave is checked before a weight is read.
    captions = make_part(cfg.captions, "captions")
    tasks = make_tasks(captions)
    rules = compose_rules(cfg)
    model = open_probed(cfg)
    num_layers, num_blocks = model.mllm.num_layers, model.denoiser.num_blocks
    plans = {rule: resolve_taps(config.taps, num_layers, num_blocks) for rule, config in rules.items()}
    states = read_states(model, [caption.text for caption in captions], cfg.batch_size)
    report: dict[str, Any] = {
        "captions": {"train": 0, "seen": 0, "unseen": 0, **Counter(caption.split for caption in captions)},
        "chance": {task.concept: 1 / len(set(task.labels[task.train])) for task in tasks},
        "accuracy": {}, "recommended": {}, "forecast": {rule: {} for rule in plans},
    }  # fmt: skip
    for source, read in states.items():
        probe = Probe(read, tasks)
        report["accuracy"][source] = probe.measure_layers()
        # Taps are chosen by one half of the tested captions, and measured by the other.
        layers = probe.choose_layers(cfg.most_layers, half=0)
        report["recommended"][source] = {
            "layers": layers,
            "taps": recommend(layers, num_layers),
            "accuracy": probe.measure_mean(layers, half=1),
            "final": probe.measure_mean([num_layers], half=1),
        }
        for rule, plan in plans.items():
            report["forecast"][rule][source] = probe.forecast(plan, half=1)
    report["reads"] = "prompt" if model.ladder.prompt_layers else "queries"
    return report


def find_best(accuracies: Sequence[float]) -> int:
    """Find the layer of the highest accuracy; of equals the deepest."""
    return max(range(len(accuracies)), key=lambda layer: (accuracies[layer], layer))


def format_report(report: dict[str, Any]) -> str:
    """Format the report: for each concept where it is read best, then the forecasts of the rules."""
    rows = []
    for source, tested in report["accuracy"].items():
        for name, concepts in tested.items():
            for concept, values in concepts.items():
                best = find_best(values)
                chance = f"{report['chance'][concept]:.2f}"
                rows.append([f"{concept}, {name}", source, best, f"{values[best]:.3f}", f"{values[-1]:.3f}", chance])
    header = ["concept, captions", "states of", "best layer", "there", "final state", "chance"]
    text = [format_table(header, rows)]
    # What was chosen for one kind of states is measured by these alone.
    worth = dict(report["forecast"])
    for source, found in report["recommended"].items():
        worth[f"chosen for {source}: {found['taps']}"] = {source: found["accuracy"]}
    rows = []
    for taps, values in worth.items():
        cells = [f"{values[source]:.3f}" if source in values else "" for source in report["accuracy"]]
        rows.append([taps, *cells])
    text.append(format_table(["taps", *(f"forecast, {source}" for source in report["accuracy"])], rows))
    return "\n\n".join(text)


def plot_accuracies(report: dict[str, Any], file: Path) -> None:
    """Plot accuracy by layer and concept: a heat map for the states of queries and one for those of prompts."""
    from matplotlib.figure import Figure

    sources = report["accuracy"]
    names = [f"{concept}, {name}" for name, concepts in next(iter(sources.values())).items() for concept in concepts]
    figure = Figure(figsize=(10, 1.6 + 0.36 * len(names) * len(sources)), layout="constrained")
    panels = figure.subplots(len(sources), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (source, tested) in zip(panels, sources.items(), strict=True):
        values = [accuracies for concepts in tested.values() for accuracies in concepts.values()]
        shown = panel.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        panel.set_yticks(range(len(names)), names)
        panel.set_title(f"states of {source}")
        figure.colorbar(shown, ax=panel, label="accuracy")
        for row, accuracies in enumerate(values):
            panel.text(find_best(accuracies), row, "×", ha="center", va="center", color="red")
    panels[-1].set_xlabel("layer (0 = embeddings, the last is the final state; × = best)")
    figure.savefig(file, dpi=110)


@command("probe")
def main(cfg: DictConfig) -> None:
    report = measure(cfg)
    folder = get_run_folder()
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot_accuracies(report, folder / "layers.png")
    print(format_report(report))
    # The rule for the states that the model's ladder reads, as the command that trains with it.
    world = HydraConfig.get().runtime.choices.get("world")
    found = report["recommended"][report["reads"]]
    print(
        f"\nMean accuracy {found['accuracy']:.3f} from layers {found['layers']} of the {report['reads']}, "
        f"{found['final']:.3f} from the final state:\n"
        f"python experiments/train.py world={world} {found['taps']}\n\nLayer against concept: {folder / 'layers.png'}"
    )


if __name__ == "__main__":
    main()

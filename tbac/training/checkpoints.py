"""Slim training checkpoints: finding, reading and checking them."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tbac.models import UniImage
from tbac.models.export import PROMPT_EMBEDDINGS, read_state
from tbac.models.saved import FACTS, read_checkpoint

REFERENCE = "denoiser.reference_embed."
log = logging.getLogger(__name__)


def newest_whole(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint of a run folder that was written last and can be read, with what it holds.

    Newer ones that can't be read are named in the log and passed over.
    """
    files = [p for p in (Path(folder) / "checkpoints").glob("*-step=*.ckpt") if p.is_file() and not p.is_symlink()]
    for file in sorted(files, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True):
        try:
            return file, read_checkpoint(file)
        except ValueError as error:
            log.warning("passing over a checkpoint: %s", error)
    return None


def newest_checkpoint(root: str | Path, stage: str) -> Path | None:
    """The checkpoint of `stage` that was written last, anywhere under `root`."""
    found = [p for p in Path(root).glob(f"**/checkpoints/{stage}-step=*.ckpt") if p.is_file()]
    return max(found, key=lambda p: (p.stat().st_mtime_ns, p.name), default=None)


def optimizer_state_of(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The optimizer's state of each parameter, by name."""
    state = checkpoint["optimizer_states"][0]["state"]
    return {name: state[i] for i, name in enumerate(checkpoint[FACTS]["optimized"]) if i in state}


def check_frozen(facts: Mapping[str, Any], model: UniImage, origin: str) -> None:
    """Compare the frozen parts that a checkpoint was trained on with those of `model`.

    Raises:
        ValueError: naming the part that differs.
    """
    known, own = facts["frozen"], model.provenance.digests
    for part in sorted({*known, *own}):
        if known.get(part) != own.get(part):
            raise ValueError(
                f"{origin} was trained on another {part} (digest {known.get(part, 'none')[:12]}…) than this model's "
                f"({own.get(part, 'none')[:12]}…)"
            )


def load_weights(checkpoint: Mapping[str, Any], model: UniImage, origin: str) -> None:
    """Load the trained weights of a checkpoint into `model`.

    Its options may be others, so that a model trained without can be tuned with them: a model that reads references
    goes on from one that doesn't with their embedding at zero, where it changes nothing.

    Raises:
        ValueError: for other frozen parts, other taps, or any missing, unexpected or misshapen tensor, by name.
    """
    facts = checkpoint[FACTS]
    check_frozen(facts, model, origin)
    plan = model.ladder.plan
    taps = {"layers": list(plan.layers), "assignment": list(plan.assignment), "mixed": plan.mixed}
    if facts["taps"] != taps:
        raise ValueError(f"{origin} was trained with taps {facts['taps']}, this model has {taps}")
    own, known = model.options(), facts.get("options", {})
    if changed := [f"{name} {known[name]} -> {own[name]}" for name in own if known.get(name, own[name]) != own[name]]:
        log.warning("%s was trained with other options: %s", origin, ", ".join(changed))
    state = dict(checkpoint["state_dict"])
    if own["reference_latents"] and not any(name.startswith(REFERENCE) for name in state):
        log.warning("%s was trained without references: their embedding starts at zero", origin)
        state |= {name: tensor for name, tensor in model.trained_state().items() if name.startswith(REFERENCE)}
    model.load_trained_state(state, origin)


def load_exported(folder: Path, model: UniImage) -> None:
    """Load the trained weights of an exported folder into `model`, such as those of the imported release.

    Raises:
        ValueError: for other frozen parts, other taps, or any missing, unexpected or misshapen tensor, by name.
    """
    config = json.loads((folder / "config.json").read_text())
    state = read_state(folder)
    if state.pop(PROMPT_EMBEDDINGS, None) is not None and model.mllm.prompt_embeddings is None:
        raise ValueError(
            f"init={folder} reads prompts with a table of its own; give model.prompt_embeddings={folder} as well"
        )
    taps = {k: config["taps"][k] for k in ("layers", "assignment", "mixed")}
    options = {
        "reference_latents": config["denoiser"].get("references", False),
        "prompt_context": config["ladder"].get("prompt_context", False),
        "spell_words": config.get("spell_words", False),
    }
    facts = {"frozen": config["frozen_digests"], "taps": taps, "options": options}
    load_weights({FACTS: facts, "state_dict": state}, model, str(folder))


def describe_model(model: UniImage) -> dict[str, Any]:
    """What a checkpoint says of the model besides its tensors."""
    plan = model.ladder.plan
    return {
        "frozen": model.provenance.digests,
        "taps": {"layers": list(plan.layers), "assignment": list(plan.assignment), "mixed": plan.mixed},
        "options": model.options(),
        "sources": {"mllm": model.provenance.mllm, "denoiser": model.provenance.denoiser},
    }

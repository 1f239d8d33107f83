"""What a prompt cache saves and what it costs, counted from shapes: for `plan.py`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.costs import Case
from tbac.models import UniImage

SPARED = {"prompts": ("vision", "prefix"), "images": ("vision",)}  # parts of a step that no longer run
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Spared:
    """What keeping prompts, or the features of their images, does to an average sample of a stage.

    Attributes:
        flops: that no longer run.
        faster: FLOPs of a step with all of its parts, over those that are left.
        bytes: of an entry.
        entries: of a sample, once each way of dropping its conditions has come up.
        bytes_per_s: that one GPU reads.
    """

    flops: float
    faster: float
    bytes: float
    entries: float
    bytes_per_s: float

    def to_dict(self) -> dict[str, float]:
        """As plain values in the units of the report."""
        return {
            "tflop_saved": round(self.flops / 1e12, 3),
            "faster_by": round(self.faster, 3),
            "mib_an_entry": round(self.bytes / MIB, 3),
            "gib_per_thousand_samples": round(1000 * self.entries * self.bytes / GIB, 2),
            "gib_read_per_s_per_gpu": round(self.bytes_per_s / GIB, 3),
        }


def count_entry_bytes(model: UniImage, case: Case, keep: str, size: int) -> float:
    """Count the bytes of what is kept of one prompt, the tokens that all begin with included.

    Args:
        model: on the meta device.
        case: the prompt; its batch size is ignored.
        keep: `prompts` or `images`.
        size: bytes of a number.
    """
    text = model.mllm.model.config.text_config
    if keep == "images":
        return float(case.side**2 * text.hidden_size * size)
    # Keys and values of all layers that the queries pass through, and the prompt's own states where they are tapped.
    channels = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    channels = channels * model.ladder.plan.deepest + len(model.ladder.prompt_layers) * text.hidden_size
    return float(case.tokens * channels * size)


def count_entries(case: Case, keep: str, dropout: Mapping[str, Any]) -> int:
    """Count how many entries a sample comes to have.

    Without its caption, or with a black image, an edit is another prompt. A text without its caption is the same empty
    prompt for all samples, and so is a black image of one size.
    """
    if not case.side:
        return 1 if keep == "prompts" else 0
    if keep == "images":
        return 1
    return 1 + sum(dropout.get(name, 0) > 0 for name in ("caption_drop_prob", "image_drop_prob"))


def plan_prompt_cache(
    model: UniImage, shares: Mapping[Case, float], flops: Mapping[str, float], options: Mapping[str, Any]
) -> dict[str, Spared]:
    """Compute what each kind of cache would save and cost after the first epoch.

    Args:
        model: on the meta device.
        shares: kind of prompt -> its share of the samples.
        flops: of an average sample by part, with all parts.
        options: `conf/plan.yaml` with the stage.
    """
    size = 2 if options["machine"]["precision"] == "bf16-mixed" else 4
    total = sum(flops.values())
    plans = {}
    for keep, parts in SPARED.items():
        spared = sum(flops.get(part, 0.0) for part in parts)
        dropout = options["stage"]["dropout"] or {}
        stored = {case: count_entries(case, keep, dropout) for case in shares}
        read = sum(share * count_entry_bytes(model, case, keep, size) for case, share in shares.items())
        entries = sum(share * stored[case] for case, share in shares.items())
        kept = sum(share * stored[case] * count_entry_bytes(model, case, keep, size) for case, share in shares.items())
        rate = options["utilisation"] * options["peak_tflops"] * 1e12 / (total - spared)
        plans[keep] = Spared(spared, total / (total - spared), kept / entries if entries else 0.0, entries, rate * read)
    return plans

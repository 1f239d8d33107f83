"""Writes the report of a verification, for people and for programs."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_prep.shards.verification import Facts


def count_repeated(counts: Counter[bytes]) -> int:
    """Count the samples that repeat what another one has."""
    return sum(n - 1 for n in counts.values())


def list_findings(facts: Facts, unit: str) -> list[tuple[str, str]]:
    """List the findings that aren't faults, for people to read.

    Args:
        facts: about the samples.
        unit: that captions are counted in.

    Returns:
        Name and value of each row of a table.
    """

    def format_share(n: int) -> str:
        return f"{n:,} ({100 * n / max(1, facts.good):.2f} %)"

    # Shares are of the samples that training takes, since faulty ones weren't counted any further.
    lengths = sorted(facts.lengths) or [0]
    rows = [
        ("samples", f"{facts.samples:,}"),
        ("that training takes", f"{facts.good:,}"),
        ("of these edits", format_share(facts.edits)),
        ("with cached latents", format_share(facts.cached)),
        ("with the caption of another one", format_share(count_repeated(facts.captions))),
        ("with the target image of another one", format_share(count_repeated(facts.images))),
        ("with a caption of GenEval's templates", format_share(facts.geneval)),
        (f"caption length, {unit}", f"median {lengths[len(lengths) // 2]}, longest {lengths[-1]}"),
    ]
    # Shards that hold only latents say nothing of the size of pictures.
    if facts.widths:
        sizes = Counter(zip(facts.widths, facts.heights, strict=True))
        (width, height), count = sizes.most_common(1)[0]
        rows.append(("sizes of target images", f"{len(sizes):,}; most often {width} x {height} ({count:,})"))
    rows += [(f"fields: {names}", f"{n:,}") for names, n in facts.schemas.most_common(5)]
    return rows


def write_report(facts: Facts, folder: Path, unit: str, out: Path) -> str:
    """Write `report.json`, `report.md` and `histograms.png`; returns the text of `report.md`.

    Args:
        facts: about the samples.
        folder: of the shards.
        unit: that captions are counted in.
        out: folder of the report.
    """
    _draw_histograms(facts, unit, out / "histograms.png")
    (out / "report.json").write_text(json.dumps(_to_json(facts), indent=2) + "\n")
    lines = [f"# Shards of {folder}", "", "| what | |", "| --- | ---: |"]
    lines += [f"| {name} | {value} |" for name, value in list_findings(facts, unit)]
    # Such captions are no fault, but a reader of the score has to know of them.
    if facts.geneval:
        lines += [
            "",
            "A GenEval score after training on captions of its templates must say so. Some of them:",
            "",
        ]
        lines += [f"- {name}" for name in facts.geneval_named]
    if facts.faults:
        lines += ["", "| fault | number | such as |", "| --- | ---: | --- |"]
        lines += [f"| {kind} | {n:,} | {'; '.join(facts.named[kind][:3])} |" for kind, n in facts.faults.most_common()]
    lines += ["", "![histograms](histograms.png)"]
    text = "\n".join(lines) + "\n"
    (out / "report.md").write_text(text)
    return text


def _to_json(facts: Facts) -> dict[str, object]:
    return {
        "samples": facts.samples,
        "good": facts.good,
        "faults": dict(facts.faults.most_common()),
        "named": facts.named,
        "repeated_captions": count_repeated(facts.captions),
        "repeated_images": count_repeated(facts.images),
        "geneval_templates": facts.geneval,
        "geneval_named": facts.geneval_named,
        "edits": facts.edits,
        "cached": facts.cached,
        "schemas": dict(facts.schemas.most_common()),
    }


def _draw_histograms(facts: Facts, unit: str, path: Path) -> None:
    """Draw histograms of sizes, aspect ratios and caption lengths into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")  # before pyplot, since there may be no display
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(10, 7))
    pairs = list(zip(facts.widths, facts.heights, strict=True))
    series: Sequence[tuple[str, list[float]]] = (
        ("shorter side of the target, pixels", [float(min(pair)) for pair in pairs]),
        ("longer side of the target, pixels", [float(max(pair)) for pair in pairs]),
        ("width / height of the target", [w / h for w, h in pairs]),
        (f"caption, {unit}", [float(n) for n in facts.lengths]),
    )
    for axes, (label, values) in zip(panels.flat, series, strict=True):
        if values:
            axes.hist(values, bins=min(40, max(1, len(set(values)))), color="#4292c6")
        axes.set_xlabel(label)
        axes.set_ylabel("samples")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)

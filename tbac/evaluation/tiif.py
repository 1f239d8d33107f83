"""TIIF-Bench: pairs of a short and a long prompt, yes/no questions, and its averages."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from tbac.evaluation.benchmarks import BenchmarkFileError, read_rows
from tbac.evaluation.trees import Target

LENGTHS = ("short", "long")
REASONINGS = ("numeracy", "comparison", "differentiation", "negation")

# Sub-attributes by level, each with the types that it is the mean of (TIIF-Bench's summary_dimension_results.py).
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "basic": {
        "attribute": ("shape+color", "color+texture", "texture+color", "shape+texture"),
        "relation": ("2d_spatial_relation", "3d_spatial_relation", "action+2d", "action+3d"),
        "reasoning": ("numeracy", "negation", "differentiation", "comparison"),
    },
    "advanced": {
        "attribute+relation": (
            "action+color", "action+texture", "color+2d", "color+3d",
            "shape+2d", "shape+3d", "texture+2d", "texture+3d",
        ),
        "attribute+reasoning": tuple(f"{r}+{a}" for r in REASONINGS for a in ("color", "texture")),
        "relation+reasoning": tuple(f"{r}+{d}" for r in REASONINGS for d in ("2d", "3d")),
        "text": ("text",),
        "style": ("style",),
    },
    "real_world": {"complex": ("real_world",)},
}  # fmt: skip
TYPES = {kind for subs in GROUPS.values() for kinds in subs.values() for kind in kinds}


@dataclass(frozen=True)
class Pair:
    """A short and a long prompt of the same content.

    Attributes:
        kind: its type, such as `2d_spatial_relation`.
        row: its line in the file of that type, from 0: the name of its pictures.
        prompts: length -> prompt.
        questions: that both pictures are asked.
        answers: the right ones.
    """

    kind: str
    row: int
    prompts: Mapping[str, str]
    questions: Sequence[str] = ()
    answers: Sequence[bool] = ()


def read_pairs(prompts: str | Path, questions: str | Path | None = None) -> list[Pair]:
    """Pairs in the order of files and lines.

    Args:
        prompts: folder of `*.jsonl` with `type`, `short_description`, `long_description`.
        questions: folder of `*.jsonl` that have `yn_question_list` and `yn_answer_list` as well, in the same order;
            None where nothing is to be scored.

    Raises:
        BenchmarkFileError: naming file, line and field, or a type that isn't TIIF-Bench's.
    """
    rows = _by_type(prompts, {"type": str, "short_description": str, "long_description": str})
    asked = _by_type(questions, {"type": str, "yn_question_list": list, "yn_answer_list": list}) if questions else {}
    pairs = []
    for kind, own in rows.items():
        if questions and len(asked.get(kind, ())) != len(own):
            raise BenchmarkFileError(
                f"{questions} has questions for {len(asked.get(kind, ()))} prompts of type {kind!r}, {prompts} has "
                f"{len(own)} such prompts"
            )
        for number, row in enumerate(own):
            question = asked[kind][number] if questions else {"yn_question_list": [], "yn_answer_list": []}
            texts, answers = question["yn_question_list"], question["yn_answer_list"]
            said = [str(answer).strip().lower() for answer in answers]
            if len(texts) != len(said) or not set(said) <= {"yes", "no"}:
                raise BenchmarkFileError(
                    f"{questions}: type {kind!r}, row {number}: yn_answer_list must hold yes or no for each question"
                )
            described = {length: row[f"{length}_description"] for length in LENGTHS}
            pairs.append(Pair(kind, number, described, texts, [answer == "yes" for answer in said]))
    return pairs


def _by_type(folder: str | Path, required: Mapping[str, type]) -> dict[str, list[dict]]:
    folder = Path(folder).expanduser()
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise BenchmarkFileError(f"TIIF-Bench's folder {folder} has no *.jsonl file")
    rows: dict[str, list[dict]] = defaultdict(list)
    for file in files:
        for row in read_rows(
            file, required, lambda row: "" if row["type"] in TYPES else f"unknown type {row['type']!r}"
        ):
            rows[row["type"]].append(row)
    return rows


def picture_path(pair: Pair, length: str, model_name: str) -> str:
    """`<type>/<model>/{short,long}_description/<row>.png`."""
    return f"{pair.kind}/{model_name}/{length}_description/{pair.row}.png"


def tiif_targets(pairs: Sequence[Pair], model_name: str) -> list[Target]:
    """Every picture of every pair."""
    paths = [(picture_path(pair, length, model_name), pair.prompts[length]) for pair in pairs for length in LENGTHS]
    return [Target(path, path, prompt) for path, prompt in paths]


def tiif_averages(by_type: Mapping[str, float]) -> dict[str, float]:
    """Averages of one prompt length.

    A sub-attribute is the mean of its types. `basic` and `advanced` are means of all their types, so that `text` and
    `style` weigh as one type each; `overall` is the mean of the nine sub-attributes. What has no type here is left out.

    Args:
        by_type: type -> share of right answers.

    Raises:
        ValueError: for no type, or one that isn't TIIF-Bench's.
    """
    unknown = sorted(set(by_type) - TYPES)
    if unknown or not by_type:
        raise ValueError(f"types of TIIF-Bench are needed, got {', '.join(unknown) or 'none'}")
    levels, subs = {}, {}
    for level, groups in GROUPS.items():
        own = [by_type[kind] for kinds in groups.values() for kind in kinds if kind in by_type]
        if own:
            levels[level] = mean(own)
        for name, kinds in groups.items():
            if found := [by_type[kind] for kind in kinds if kind in by_type]:
                subs[name] = mean(found)
    return {"overall": mean(subs.values()), **levels, **subs}

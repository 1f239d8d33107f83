"""The benchmarks: each reads its files when it is made, so that a wrong one is named before a model is loaded."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from omegaconf import DictConfig
from PIL import Image

from experiments.benchmarks.rows import Benchmark, Row, Summary, missing
from tbac.evaluation.benchmarks import read_geneval
from tbac.evaluation.dense import Mode, Question, dense_score, read_dpg_questions
from tbac.evaluation.imgedit import PLACEHOLDER, edit_scores, read_imgedit, read_judge_prompts, reply_score
from tbac.evaluation.judges import JudgeError, yes_or_no, yes_or_no_lines
from tbac.evaluation.rules import EVERY, aggregate_by_tag, judge_geneval
from tbac.evaluation.tiif import GROUPS, LENGTHS, Pair, picture_path, read_pairs, tiif_averages, tiif_targets
from tbac.evaluation.trees import (
    Target,
    dpg_targets,
    edit_targets,
    folder_targets,
    geneval_targets,
    read_prompt_folder,
    write_geneval_metadata,
)
from tbac.evaluation.wise import INSTRUCTION, NUM_PROMPTS, ratings, read_wise, wiscore, wise_scores, wise_targets

YES_OR_NO = "{question} Answer with yes or no."
LINES = """Answer these questions about the picture, in this order. Write a line for each, which begins with yes or no.
{questions}"""


def opened(path: Path) -> Image.Image:
    """A picture of a tree, decoded."""
    with Image.open(path) as image:
        return image.convert("RGB")


def count_difference(found: int, published: int, what: str) -> list[str]:
    """Why a number of items isn't that of the published benchmark."""
    return [] if found == published else [f"{found} {what} instead of {published}"]


class _NothingBeside:
    def write_beside(self, root: Path) -> None:
        """Nothing but pictures belongs to the tree."""


class _Asked(_NothingBeside):
    """A benchmark whose pictures are judged by questions."""

    judged = True

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError for a judge that can't be asked."""
        if not hasattr(judge, "ask"):
            raise ValueError(f"this benchmark asks questions; {type(judge).__name__} only detects")


class GenEval:
    """553 prompts with the objects that must be seen; four samples each."""

    title, judged = "GenEval", True

    def __init__(self, cfg: DictConfig, samples: int) -> None:
        self.file, self.samples = str(cfg.file), samples
        self.prompts = read_geneval(self.file)

    def targets(self) -> list[Target]:
        """`{i:05d}/samples/{k:05d}.png`."""
        return geneval_targets(self.prompts, self.samples)

    def write_beside(self, root: Path) -> None:
        """`{i:05d}/metadata.jsonl`."""
        write_geneval_metadata(self.prompts, root)

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError for a judge that doesn't detect."""
        if not callable(judge):
            raise ValueError(f"GenEval needs a detector, judge=template or judge=geneval; got {type(judge).__name__}")

    def rows(self, root: Path, judge: Any) -> Iterator[Row]:
        """GenEval's rules on every picture."""
        for number, target in enumerate(self.targets()):
            row = self.prompts[number // self.samples]
            if absent := missing(target, row["tag"], root):
                yield absent
                continue
            colored = {wanted["class"] for wanted in row["include"] if "color" in wanted}
            scan = judge(opened(root / target.path), colored)
            verdict = judge_geneval(scan.detections, row, getattr(judge, "thresholds", EVERY))
            yield Row(target.path, row["tag"], row["prompt"], "scored", float(verdict.correct), verdict.reason)

    def summary(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Share of right pictures per tag, and their mean; a missing picture is wrong."""
        scores = aggregate_by_tag([(row.group, bool(row.score)) for row in rows])
        differences = count_difference(len(self.prompts), 553, "prompts")
        differences += count_difference(self.samples, 4, "samples per prompt")
        if "Mask2Former" not in judge_name:
            differences.append(f"judged by {judge_name} instead of Mask2Former and CLIP")
        protocol = f"GenEval's rules; {len(self.prompts)} prompts of {self.file}, {self.samples} each"
        return Summary(scores, protocol, differences)


class DPG(_Asked):
    """1,065 dense prompts with dependent yes/no questions; four samples each in a grid."""

    title = "DPG-Bench"

    def __init__(self, cfg: DictConfig, samples: int) -> None:
        self.file, self.mode = str(cfg.file), cfg.mode
        if self.mode not in ("official", "fixed"):
            raise ValueError(f"benchmark.mode must be official or fixed, got {self.mode!r}")
        self.prompts = read_prompt_folder(self.file)
        self.questions_file = cfg.questions
        self.questions: dict[Mode, dict[str, list[Question]]] = {}
        if cfg.questions:
            self.questions = {"official": read_dpg_questions(cfg.questions, "official")}
            self.questions["fixed"] = read_dpg_questions(cfg.questions, "fixed")
            if absent := sorted(set(self.prompts) - set(self.questions["fixed"])):
                raise ValueError(f"{cfg.questions} has no question about {len(absent)} prompts, such as {absent[0]}")

    def targets(self) -> list[Target]:
        """`<stem>.png`."""
        return dpg_targets(self.prompts)

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError for a judge that can't be asked, or without questions."""
        super().check_judge(judge)
        if not self.questions:
            raise ValueError("benchmark.questions is needed for scoring: DPG-Bench's dpg_bench.csv")

    def rows(self, root: Path, judge: Any) -> Iterator[Row]:
        """Every question about every quarter of every grid."""
        for target in self.targets():
            if absent := missing(target, "", root):
                yield absent
                continue
            questions = self.questions["fixed"][target.item]
            answers: list[dict[str, bool]] = []
            failed = ""
            for quarter in quarters(opened(root / target.path)):
                own: dict[str, bool] = {}
                for question in questions:
                    try:
                        reply = judge.ask(YES_OR_NO.format(question=question.text), [quarter])
                    except JudgeError as error:
                        failed = f"{question.text} {error}"
                        continue
                    answer = yes_or_no(reply)
                    if answer is None:
                        failed = f"{question.text} {reply}"
                    else:
                        own[str(question.number)] = answer
                answers.append(own)
            details = {"answers": answers}
            if failed:
                yield Row(target.path, "", target.prompt, "failed", None, failed, details)
                continue
            wrong = [q.text for q in questions if not all(own[str(q.number)] for own in answers)]
            share = mean(mean(own.values()) for own in answers)
            yield Row(target.path, "", target.prompt, "scored", share, f"not in all: {', '.join(wrong)}", details)

    def summary(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Scores of both modes; `overall` is that of `benchmark.mode`."""
        stems = {target.path: target.item for target in self.targets()}
        answers = {
            stems[row.picture]: [{int(k): v for k, v in own.items()} for own in row.details["answers"]]
            for row in rows
            if row.state == "scored"
        }
        failed = {stems[row.picture] for row in rows if row.state == "failed"}
        scores: dict[str, float] = {}
        notes: list[str] = []
        for mode in (self.mode, "fixed" if self.mode == "official" else "official"):
            own = {k: v for k, v in self.questions[mode].items() if k in self.prompts and k not in failed}
            asked = {
                item: [{q.number: picture[q.number] for q in own[item]} for picture in pictures]
                for item, pictures in answers.items()
                if item in own
            }
            try:
                result = dense_score(asked, own, mode)
            except ValueError as error:
                notes.append(f"No score by the {mode} rules: {error}")
                continue
            if mode == self.mode:
                scores |= {"overall": result.overall, **result.categories}
            else:
                scores |= {f"overall, {mode} rules": result.overall}
            if result.dropped:
                notes.append(f"The {mode} rules drop {len(result.dropped)} prompts without a word.")
        if not scores:
            raise ValueError(" ".join(notes))
        if failed:
            notes.append(f"{len(failed)} prompts without usable replies are in no mean.")
        differences = count_difference(len(self.prompts), 1065, "prompts")
        if "mplug" not in judge_name.lower():
            differences.append(f"judged by {judge_name} instead of mPLUG-large")
        if self.mode == "fixed":
            differences.append("scored by the fixed rules; benchmark.mode=official keeps the official scorer's quirks")
        return Summary(scores, f"{len(self.prompts)} prompts of {self.file}, {self.mode} rules", differences, notes)


def quarters(grid: Image.Image) -> list[Image.Image]:
    """The four pictures of a grid, row by row."""
    width, height = grid.width // 2, grid.height // 2
    places = [(x, y) for y in (0, height) for x in (0, width)]
    return [grid.crop((x, y, x + width, y + height)) for x, y in places]


class TIIF(_Asked):
    """Pairs of a short and a long prompt with yes/no questions."""

    title = "TIIF-Bench"

    def __init__(self, cfg: DictConfig, samples: int) -> None:
        self.file, self.model_name, self.published = str(cfg.file), str(cfg.model_name), int(cfg.published)
        if cfg.name == "tiif_mini":
            self.title = "TIIF-Bench testmini"
        self.pairs = read_pairs(self.file, cfg.questions)
        self.asked = bool(cfg.questions)

    def targets(self) -> list[Target]:
        """`<type>/<model>/{short,long}_description/<row>.png`."""
        return tiif_targets(self.pairs, self.model_name)

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError for a judge that can't be asked, or without questions."""
        super().check_judge(judge)
        if not self.asked:
            raise ValueError("benchmark.questions is needed for scoring: TIIF-Bench's folder of eval prompts")

    def rows(self, root: Path, judge: Any) -> Iterator[Row]:
        """All questions about each picture at once, as TIIF-Bench asks them."""
        targets = {target.path: target for target in self.targets()}
        for pair in self.pairs:
            for length in LENGTHS:
                yield self._row(root, judge, pair, targets[picture_path(pair, length, self.model_name)], length)

    def _row(self, root: Path, judge: Any, pair: Pair, target: Target, length: str) -> Row:
        if absent := missing(target, pair.kind, root):
            return absent
        details = {"length": length}
        texts = "\n".join(text.strip() for text in pair.questions)
        try:
            reply = judge.ask(LINES.format(questions=texts), [opened(root / target.path)])
        except JudgeError as error:
            return Row(target.path, pair.kind, target.prompt, "failed", None, str(error), details)
        answers = yes_or_no_lines(reply, len(pair.questions))
        if answers is None:
            reason = f"{len(pair.questions)} questions were answered with: {reply}"
            return Row(target.path, pair.kind, target.prompt, "failed", None, reason, details)
        right = [a == b for a, b in zip(answers, pair.answers, strict=True)]
        wrong = ", ".join(q for q, ok in zip(pair.questions, right, strict=True) if not ok)
        details |= {"right": sum(right), "asked": len(right)}  # type: ignore[dict-item]
        return Row(target.path, pair.kind, target.prompt, "scored", mean(right), wrong, details)

    def summary(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Averages of both lengths; a missing picture answers nothing right, a failed one isn't counted."""
        scores: dict[str, float] = {}
        counts = {(pair.kind, pair.row): len(pair.questions) for pair in self.pairs}
        for length in LENGTHS:
            right: dict[str, int] = defaultdict(int)
            asked: dict[str, int] = defaultdict(int)
            for row in rows:
                kind, _, described, name = row.picture.split("/")
                if described != f"{length}_description" or row.state == "failed":
                    continue
                right[kind] += row.details.get("right", 0)
                asked[kind] += counts[kind, int(name.removesuffix(".png"))]
            by_type = {kind: 100 * right[kind] / asked[kind] for kind in asked}
            if by_type:
                scores |= {f"{name}, {length}": value for name, value in tiif_averages(by_type).items()}
        if not scores:
            raise ValueError("no picture of TIIF-Bench could be scored")
        overall = [scores[f"overall, {length}"] for length in LENGTHS if f"overall, {length}" in scores]
        differences = count_difference(len(self.pairs), self.published, "pairs")
        if absent := [n for groups in GROUPS.values() for n in groups if f"{n}, short" not in scores]:
            differences.append(f"nothing of {', '.join(absent)}")
        if "gpt-4" not in judge_name.lower():
            differences.append(f"judged by {judge_name} instead of GPT-4o")
        protocol = f"{len(self.pairs)} pairs of {self.file}"
        return Summary({"overall": mean(overall), **scores}, protocol, differences)


class ImgEdit(_Asked):
    """737 edits of nine kinds, rated by a judge from 1 to 5."""

    title = "ImgEdit"

    def __init__(self, cfg: DictConfig, samples: int) -> None:
        self.file = str(cfg.file)
        self.edits = read_imgedit(cfg.file, cfg.images)
        kinds = {edit.kind for edit in self.edits.values()}
        self.judge_prompts = read_judge_prompts(cfg.questions, kinds) if cfg.questions else {}

    def targets(self) -> list[Target]:
        """`<key>.png`."""
        return edit_targets({key: (edit.instruction, edit.image) for key, edit in self.edits.items()})

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError for a judge that can't be asked, or without its prompts."""
        super().check_judge(judge)
        if not self.judge_prompts:
            raise ValueError("benchmark.questions is needed for scoring: ImgEdit's prompts.json")

    def rows(self, root: Path, judge: Any) -> Iterator[Row]:
        """The judge sees the source and the edited picture."""
        for target in self.targets():
            edit = self.edits[target.item]
            if absent := missing(target, edit.kind, root):
                yield absent
                continue
            text = self.judge_prompts[edit.kind].replace(PLACEHOLDER, edit.instruction)
            try:
                reply = judge.ask(text, [opened(edit.image), opened(root / target.path)])
            except JudgeError as error:
                yield Row(target.path, edit.kind, edit.instruction, "failed", None, str(error))
                continue
            score = reply_score(reply)
            if score is None:
                yield Row(target.path, edit.kind, edit.instruction, "failed", None, f"no rating in: {reply}")
            else:
                yield Row(target.path, edit.kind, edit.instruction, "scored", score / 5, reply, {"reply": reply})

    def summary(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Macro and micro mean and kinds; edits without a rating are in no mean, as in the official scorer."""
        items = {target.path: target.item for target in self.targets()}
        replies = {items[row.picture]: row.details.get("reply") for row in rows}
        result = edit_scores(replies, {key: edit.kind for key, edit in self.edits.items()})
        differences = count_difference(len(self.edits), 737, "edits")
        differences += count_difference(len(result.by_kind), 9, "kinds")
        if result.unscored:
            differences.append(f"{len(result.unscored)} edits without a rating, which are in no mean")
        if "gpt-4" not in judge_name.lower():
            differences.append(f"judged by {judge_name} instead of GPT-4o")
        scores = {"overall": result.macro, "mean over edits": result.micro, **result.by_kind}
        return Summary(scores, f"{len(self.edits)} edits of {self.file}", differences)


class WISE(_Asked):
    """1,000 prompts that need knowledge of the world, rated by a judge from 0 to 2 in three respects."""

    title = "WISE"

    def __init__(self, cfg: DictConfig, samples: int) -> None:
        self.file = str(cfg.file)
        self.prompts = read_wise(cfg.file)

    def targets(self) -> list[Target]:
        """`<prompt_id>.png`."""
        return wise_targets(self.prompts)

    def rows(self, root: Path, judge: Any) -> Iterator[Row]:
        """The judge knows what the prompt means."""
        for row, target in zip(self.prompts, self.targets(), strict=True):
            if absent := missing(target, row.category, root):
                yield absent
                continue
            try:
                text = INSTRUCTION.format(prompt=row.prompt, explanation=row.explanation)
                reply = judge.ask(text, [opened(root / target.path)])
            except JudgeError as error:
                yield Row(target.path, row.category, row.prompt, "failed", None, str(error))
                continue
            rated = ratings(reply)
            if rated is None:
                yield Row(target.path, row.category, row.prompt, "failed", None, f"no three ratings in: {reply}")
            else:
                said = ", ".join(f"{k} {v}" for k, v in rated.items())
                yield Row(target.path, row.category, row.prompt, "scored", wiscore(rated), said, {"ratings": rated})

    def summary(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """WiScore by category and overall; a missing picture has 0, one without ratings isn't counted."""
        numbers = {target.path: row.number for row, target in zip(self.prompts, self.targets(), strict=True)}
        counted = {numbers[row.picture]: row.score or 0.0 for row in rows if row.state != "failed"}
        differences = count_difference(len(self.prompts), NUM_PROMPTS, "prompts")
        differences.append("the judge is instructed in our own words")
        if "gpt-4" not in judge_name.lower():
            differences.append(f"judged by {judge_name} instead of GPT-4o")
        scores = wise_scores(counted, self.prompts)
        return Summary(scores, f"{len(self.prompts)} prompts of {self.file}", differences)


class Folder(_NothingBeside):
    """One's own prompts: pictures without a score."""

    title, judged = "Prompts", False

    def __init__(self, cfg: DictConfig, samples: int) -> None:
        self.file, self.samples = str(cfg.file), samples
        self.prompts = read_prompt_folder(self.file)

    def targets(self) -> list[Target]:
        """`<name>.png`, or `<name>_<k>.png` with several samples."""
        return folder_targets(self.prompts, self.samples)

    def check_judge(self, judge: Any) -> None:
        """Nothing is judged."""

    def rows(self, root: Path, judge: Any) -> Iterator[Row]:
        """Which pictures are there."""
        for target in self.targets():
            yield missing(target, "", root) or Row(target.path, "", target.prompt)

    def summary(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """How many pictures are there."""
        there = sum(row.state == "scored" for row in rows)
        return Summary({"pictures": float(there)}, f"{len(self.prompts)} prompts of {self.file}", ["no score"])


SUITES: Mapping[str, type[Benchmark]] = {
    "geneval": GenEval,
    "dpg": DPG,
    "tiif": TIIF,
    "tiif_mini": TIIF,
    "imgedit": ImgEdit,
    "wise": WISE,
    "folder": Folder,
}

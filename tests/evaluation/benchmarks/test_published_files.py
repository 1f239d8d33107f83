"""Every published file is read to its end, and its first prompts are drawn where its own scorer looks for them."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tbac.evaluation.benchmarks.base import PictureBenchmark
from tbac.evaluation.benchmarks.corebench import CoReBench
from tbac.evaluation.benchmarks.dpg import DPG
from tbac.evaluation.benchmarks.geneval import GenEval
from tbac.evaluation.benchmarks.geneval2 import GenEval2
from tbac.evaluation.benchmarks.imgedit import ImgEdit
from tbac.evaluation.benchmarks.longtext import LongText
from tbac.evaluation.benchmarks.published import PROTOCOLS
from tbac.evaluation.benchmarks.rows import Drawn, Row
from tbac.evaluation.benchmarks.tiif import TIIF
from tbac.evaluation.benchmarks.unigenbench import UniGenBench
from tbac.evaluation.benchmarks.wise import WISE, WISEVerified
from tbac.evaluation.judges.base import JudgeFacts
from tests.helpers.pictures import make_noise_image
from tests.helpers.published import locate_published


@dataclass(frozen=True)
class Case:
    """A published set: how it is read, how many prompts it holds, and how its pictures are named."""

    make: Callable[..., PictureBenchmark]
    files: dict[str, str]
    prompts: int
    naming: str


CASES = {
    "geneval": Case(GenEval, {"file": "geneval/evaluation_metadata.jsonl"}, 553, r"\d{5}/samples/\d{5}\.png"),
    "dpg": Case(DPG, {"file": "dpg"}, 1065, r"[\w-]+\.png"),
    "tiif": Case(
        TIIF,
        {"file": "tiif/test_prompts", "questions": "tiif/test_eval_prompts"},
        2 * 2538,
        r"[\w+]+/tbac/(short|long)_description/\d+\.png",
    ),
    "tiif_mini": Case(
        TIIF,
        {"file": "tiif/testmini_prompts", "questions": "tiif/testmini_eval_prompts"},
        2 * 277,
        r"[\w+]+/tbac/(short|long)_description/\d+\.png",
    ),
    "imgedit": Case(
        ImgEdit, {"file": "imgedit/basic_edit.json", "questions": "imgedit/prompts.json"}, 737, r"\d+\.png"
    ),
    "wise": Case(WISE, {"file": "wise/legacy"}, 1000, r"\d+\.png"),
    "wise_verified": Case(WISEVerified, {"file": "wise/verified"}, 1000, r"\d+\.png"),
    "geneval2": Case(GenEval2, {"file": "geneval2/geneval2_data.jsonl"}, 800, r"\d{5}\.png"),
    "unigenbench": Case(UniGenBench, {"file": "unigenbench/test_prompts_en.csv"}, 600, r"en/tbac/\d+_[0-3]\.png"),
    "corebench": Case(CoReBench, {"file": "corebench"}, 1080, r"tbac/([CR]-[A-Z]{2})/\1-\d{3}-[0-3]\.png"),
    "longtext": Case(LongText, {"file": "longtext/text_prompts.jsonl"}, 160, r"0\d{3}_[1-4]\.png"),
}


def make_benchmark(name: str, folder: Path, **options: Any) -> PictureBenchmark:
    """Make a benchmark of the published files; what these lack, the pictures of edits, is filled in."""
    case = CASES[name]
    files = {option: str(locate_published(path)) for option, path in case.files.items()}
    if name == "dpg":
        import tarfile

        with tarfile.open(Path(files["file"]) / "prompts.tar.gz") as packed:
            packed.extractall(folder, filter="data")
        files["file"] = str(next(folder.rglob("*.txt")).parent)
    if name == "imgedit":
        for row in json.loads(Path(files["file"]).read_text()).values():
            picture = folder / "images" / row["id"]
            picture.parent.mkdir(parents=True, exist_ok=True)
            if not picture.exists():
                make_noise_image(0, (8, 8)).save(picture, format="PNG")
        files["images"] = str(folder / "images")
    return case.make(name=name, **files, **options)


@pytest.mark.parametrize("name", CASES)
def test_all_prompts_are_read_and_every_picture_has_its_published_name(name: str, tmp_path: Path) -> None:
    benchmark, case = make_benchmark(name, tmp_path), CASES[name]
    assert len({target.item for target in benchmark.targets}) == case.prompts == PROTOCOLS[name].num_prompts
    for target in benchmark.targets:
        assert re.fullmatch(case.naming, target.path), target.path
    # The digest of the published prompts is known, so that others are told from them.
    assert benchmark.describe_protocol([], JudgeFacts(), Drawn()).prompts == PROTOCOLS[name].prompts


@pytest.mark.parametrize("name", CASES)
def test_a_picture_counts_for_the_scores_and_a_missing_one_lowers_them(name: str, tmp_path: Path) -> None:
    benchmark = make_benchmark(name, tmp_path, limit=20)
    rows = [Row(t.path, benchmark.find_group(t), t.prompt, "missing") for t in benchmark.targets]
    if name in ("imgedit", "dpg"):  # edits without a rating aren't counted; DPG's questions aren't published here
        return
    scores = benchmark.summarize(rows, "j").scores
    assert set(scores.values()) == {0.0}
    cells = [count.cell for row in rows for count in benchmark.count(row)]
    assert list(benchmark.combine(dict.fromkeys(cells, 1.0)).values()) == pytest.approx([1.0] * len(scores))


@pytest.mark.slow
@pytest.mark.usefixtures("trained_run")
@pytest.mark.parametrize("name", CASES)
def test_the_first_four_prompts_are_drawn_under_their_names(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.helpers.commands import run_to_success

    benchmark = make_benchmark(name, tmp_path, limit=4)
    files = [f"benchmark.{o}={getattr(benchmark, o)}" for o in ("file", "images", "questions") if hasattr(benchmark, o)]
    files = [option for option in files if not option.endswith("=None")]
    if name == "dpg":
        files.append("benchmark.questions=null")
    options = ["checkpoint=run", "device=cpu", "benchmark.num_inference_steps=1", "benchmark.limit=4", "samples=4"]
    run_to_success("evaluate", capfd, *options, f"benchmark={name}", *files, "steps=[generate]", "out=one")
    drawn = {path.relative_to(f"one/{name}").as_posix() for path in Path(f"one/{name}").rglob("*.png")}
    per_prompt = {"geneval": 4, "unigenbench": 4, "corebench": 4, "longtext": 4}.get(name, 1)
    assert len(drawn) == 4 * per_prompt
    assert drawn >= {target.path for target in benchmark.targets}
    for path in drawn:
        assert re.fullmatch(CASES[name].naming, path), path
    if name == "geneval2":
        paths = json.loads(Path("one/geneval2/image_paths.json").read_text())
        assert all(Path(paths[target.prompt]).is_file() for target in benchmark.targets)

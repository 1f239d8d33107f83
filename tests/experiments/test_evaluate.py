"""The steps of a benchmark: a tree on any number of processes, scored and reported, and gone on with."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tbac.evaluation.benchmarks.rows import Drawn
from tbac.evaluation.benchmarks.wise import WISEVerified
from tbac.evaluation.judges.base import JudgeFacts
from tests.helpers.commands import FEW, run_to_message, run_to_success
from tests.helpers.endpoint import Server, make_completion, serve_endpoint
from tests.helpers.processes import start_command
from tests.helpers.published import locate_published

pytestmark = pytest.mark.usefixtures("trained_run")
COMMON = ["checkpoint=run", "benchmark.num_inference_steps=2", "device=cpu", "samples=2"]


def tree(out: str) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in Path(out, "geneval").rglob("*") if p.is_file()}


def test_processes_share_the_work_and_the_steps_go_on(capfd: pytest.CaptureFixture[str]) -> None:
    run_to_success("evaluate", capfd, *COMMON, "out=one")
    report = json.loads(Path("one/report.json").read_text())
    judge, *rows = [json.loads(line) for line in Path("one/geneval.results.jsonl").read_text().splitlines()]
    assert judge["judge"] == judge["facts"]["name"] == "tbac.evaluation.detectors.template.TemplateDetector.from_world"
    assert report["pictures"] == len(rows) == sum(name.endswith(".png") for name in tree("one"))
    assert not report["missing"]
    assert not report["comparable"]
    assert "2 each; judge tbac.evaluation.detectors.template.TemplateDetector" in report["protocol"]
    assert Image.open("one/pictures.png").width > 100  # all are wrong, so there are no best and no worst
    text = Path("one/report.md").read_text()
    assert "; num prompts 12 instead of 553; samples 2 instead of 4." in text
    assert "published |" not in text  # published rows stand beside comparable scores alone
    page = Path("one/report.html").read_text()
    assert page.count("data:image/png;base64,") == 24  # each picture once, as small as it is
    assert report["intervals"]["overall"][0] <= report["overall"] <= report["intervals"]["overall"][1]
    assert report["protocol_fields"]["sampling"] == {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 42}
    assert report["protocol_fields"]["cut"] == 0

    for rank in (0, 1, 2):
        run_to_success("evaluate", capfd, *COMMON, "out=three", "steps=[generate]", f"rank={rank}", "world_size=3")
    assert tree("three") == tree("one")

    made = {p: p.stat().st_mtime_ns for p in Path("one/geneval").rglob("*.png")}
    gone, torn = sorted(made)[3], sorted(made)[7]
    gone.unlink()
    torn.write_bytes(torn.read_bytes()[:50])
    run_to_success("evaluate", capfd, *COMMON, "out=one", "steps=[score,report]")
    report = json.loads(Path("one/report.json").read_text())
    assert [f"one/geneval/{name}" for name in report["missing"]] == [str(gone), str(torn)]
    text = Path("one/report.md").read_text()
    assert "2 of 24 pictures are missing" in text
    assert f"1 of these lie there and can't be used: {torn.relative_to('one/geneval')} is not a readable image" in text
    run_to_success("evaluate", capfd, *COMMON, "out=one")
    assert tree("one") == tree("three")
    assert [p for p in made if p.stat().st_mtime_ns != made[p]] == [gone, torn]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["steps=[paint]"], "steps must be some of ['generate', 'score', 'report'], got ['paint']"),
        (["steps=[]"], "steps must be some of"),
        (["samples=0"], "samples must be at least 1, got 0"),
        (["rank=3", "world_size=3", "steps=[generate]"], "rank=3 of world_size=3"),
        (["world_size=2"], "several processes take steps=[generate]"),
        (["steps=[report]"], "steps=[score] writes it"),
    ],
)
def test_bad_steps_are_named(arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert words in run_to_message("evaluate", capfd, *COMMON, "out=x", *arguments)


def test_pictures_of_another_checkpoint_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    run_to_success("evaluate", capfd, *COMMON, "out=one", "steps=[generate]")
    before = tree("one")
    run_to_success("train", capfd, *FEW, "hydra.run.dir=other", "stage.lr=5e-3", "callbacks.sample_grid.prompts=[]")
    text = run_to_message("evaluate", capfd, *COMMON, "checkpoint=other", "out=one")
    assert "was made otherwise (trained " in text
    assert tree("one") == before
    # Its scores aren't another's either, whichever step is asked for.
    other = [*COMMON, "checkpoint=other", "out=one"]
    assert "were drawn by another checkpoint" in run_to_message("evaluate", capfd, *other, "steps=[score,report]")
    run_to_success("evaluate", capfd, *COMMON, "out=one", "steps=[score,report]")
    assert result("one")["drawn_by_checkpoint"]
    assert "were drawn by another checkpoint" in run_to_message("evaluate", capfd, *other, "steps=[report]")
    text = run_to_message("evaluate", capfd, *COMMON, "checkpoint=absent", "out=one", "steps=[report]")
    assert "checkpoint absent doesn't exist" in text
    # Old scores don't stand under new pictures.
    run_to_success("evaluate", capfd, *other, "overwrite=true", "steps=[generate]")
    assert tree("one").keys() == before.keys()
    assert tree("one") != before
    assert "drawn by another checkpoint" in run_to_message("evaluate", capfd, *other, "steps=[report]")
    run_to_success("evaluate", capfd, *other, "steps=[score,report]")
    again = [*other, "overwrite=true", "benchmark.guidance_scale=9"]
    run_to_success("evaluate", capfd, *again, "steps=[generate]")
    text = run_to_message("evaluate", capfd, *again, "steps=[report]")
    assert "is of other pictures than lie in " in text
    assert "(00000/samples/00000.png and 23 more)" in text


def test_processes_that_drew_otherwise_fill_no_tree(capfd: pytest.CaptureFixture[str]) -> None:
    common = [*COMMON, "out=one"]
    for rank, scale in ((0, 3.0), (1, 9.0)):
        drawing = ["steps=[generate]", "world_size=2", f"rank={rank}", f"benchmark.guidance_scale={scale}"]
        run_to_success("evaluate", capfd, *common, *drawing)
    text = run_to_message("evaluate", capfd, *common, "steps=[score,report]")
    assert "guidance_scale 3.0 -> 9.0" in text


def test_a_folder_without_a_picture_gets_no_score(capfd: pytest.CaptureFixture[str]) -> None:
    text = run_to_message("evaluate", capfd, *COMMON, "out=one", "steps=[score,report]")
    assert "one/geneval holds no picture of GenEval" in text
    run_to_success("evaluate", capfd, *COMMON, "out=one", "steps=[generate]", "benchmark.limit=1")
    text = run_to_message("evaluate", capfd, *COMMON, "against=run", "out=one", "steps=[score,report]")
    assert "one/against/geneval holds no picture of GenEval" in text


def test_a_second_checkpoint_that_is_absent_is_named_before_anything_is_drawn(
    capfd: pytest.CaptureFixture[str],
) -> None:
    text = run_to_message("evaluate", capfd, *COMMON, "against=absent", "out=one")
    assert "against=absent: " in text
    assert not list(Path("one").rglob("*.png"))


def test_a_model_is_held_against_another_only_as_both_were_drawn_and_judged(
    endpoint: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [*COMMON, "benchmark=wise", "benchmark.file=wise.json", "judge=endpoint", "judge.max_retries=0"]
    write_wise(Path("wise.json"))
    endpoint.answers = [make_completion("Consistency: 2\nRealism: 1\nAesthetic Quality: 0")]
    run_to_success("evaluate", capfd, *options, "out=one", "steps=[generate]")
    run_to_success("evaluate", capfd, *options, "out=one/against", "benchmark.seed=7", "steps=[generate]")
    both = [*options, "against=run", "out=one"]
    Path("one/against/wise/401.png").unlink()
    run_to_success("evaluate", capfd, *both, "steps=[score,report]")
    text = Path("one/report.md").read_text()
    assert "The models drew from different noise (seed 42 and 7)" in text
    assert "Of run (against), 1 of 6 pictures are missing: 401.png" in text
    assert result("one")["against"]["missing"] == ["401.png"]
    # The first is judged anew by another judge.
    endpoint.answers = [make_completion("Consistency: 0\nRealism: 0\nAesthetic Quality: 0", model="other")]
    run_to_success("evaluate", capfd, *options, "out=one", "judge.model=other", "steps=[score]")
    text = run_to_message("evaluate", capfd, *both, "judge.model=other", "steps=[report]")
    assert "steps=[score,report] judges both by one" in text


def test_a_judge_that_refuses_is_named_with_its_reason(endpoint: Server, capfd: pytest.CaptureFixture[str]) -> None:
    options = [*COMMON, "benchmark=wise", "benchmark.file=wise.json", "judge=endpoint", "judge.max_retries=0"]
    options.append("out=one")
    write_wise(Path("wise.json"))
    run_to_success("evaluate", capfd, *options, "steps=[generate]")
    # A wrong key is tried once, not for every picture.
    endpoint.answers = [(401, {"error": {"message": "who are you"}})]
    text = run_to_message("evaluate", capfd, *options, "steps=[score,report]")
    assert "check OPENAI_API_KEY" in text
    assert "who are you" in text
    assert len(endpoint.requests) == 1
    # Where each question fails by itself, the first reason is told.
    endpoint.answers = [(400, {"error": {"message": "too large a picture"}})]
    text = run_to_message("evaluate", capfd, *options, "steps=[score,report]")
    assert "the judge judged no picture; the first failure, " in text
    assert "too large a picture" in text


def test_scores_stay_those_of_the_questions_that_were_asked(
    in_world: Path, endpoint: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [*COMMON, *write_imgedit(in_world), "out=one"]
    endpoint.answers = [make_completion("a: 5\nb: 5\nc: 5")]
    easy = {kind: "say 5 <edit_prompt>" for kind in ("adjust", "style")}
    Path("easy.json").write_text(json.dumps(easy))
    run_to_success("evaluate", capfd, *options, "benchmark.questions=easy.json")
    asked = result("one")["protocol_fields"]["questions"]
    run_to_success("evaluate", capfd, *options, "benchmark.questions=easy.json", "steps=[report]")
    assert result("one")["protocol_fields"]["questions"] == asked
    text = run_to_message("evaluate", capfd, *options, "steps=[report]")
    assert f"one/imgedit.results.jsonl was judged with other questions ({asked})" in text


def test_a_second_checkpoint_is_drawn_from_the_same_noise_and_compared(capfd: pytest.CaptureFixture[str]) -> None:
    run_to_success("evaluate", capfd, *COMMON, "against=run", "benchmark.limit=3", "out=two")
    ours = {p.relative_to("two"): p.read_bytes() for p in Path("two/geneval").rglob("*.png")}
    theirs = {p.relative_to("two/against"): p.read_bytes() for p in Path("two/against/geneval").rglob("*.png")}
    assert ours == theirs
    report = result("two")
    assert len(ours) == report["pictures"] == 6  # of the first three prompts
    assert "num prompts 3 instead of 553" in report["differences"]
    assert report["against"]["scores"]["overall"] == report["overall"]
    assert set(map(tuple, report["against"]["intervals_of_difference"].values())) == {(0.0, 0.0)}
    assert Path("two/report.html").read_text().count("data:image/png;base64,") == 12


def result(out: str) -> dict:
    return json.loads(Path(out, "report.json").read_text())


@pytest.mark.parametrize(("benchmark", "pictures"), [("dpg", 2), ("tiif", 10), ("tiif_mini", 10)])
def test_suites_with_questions_are_drawn_by_any_number_of_processes_and_scored(
    benchmark: str, pictures: int, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [*COMMON, f"benchmark={benchmark}"]
    if benchmark == "tiif_mini":
        options.append("benchmark.model_name=org/model")  # as on a model hub
    run_to_success("evaluate", capfd, *options, "out=one")
    made = {p.relative_to("one").as_posix(): p.read_bytes() for p in Path("one", benchmark).rglob("*.png")}
    assert len(made) == result("one")["pictures"] == pictures
    for rank in (0, 1):
        run_to_success("evaluate", capfd, *options, "out=two", "steps=[generate]", f"rank={rank}", "world_size=2")
    assert {p.relative_to("two").as_posix(): p.read_bytes() for p in Path("two", benchmark).rglob("*.png")} == made
    assert not result("one")["failed"]
    assert not result("one")["comparable"]
    first = sorted(made)[0]
    Path("one", first).unlink()
    run_to_success("evaluate", capfd, *options, "out=one", "steps=[score,report]")
    assert result("one")["missing"] == [first.removeprefix(f"{benchmark}/")]


@pytest.mark.xdist_group("trainings")  # the evaluation is forked as they are
def test_a_killed_run_goes_on_to_the_same_tree(capfd: pytest.CaptureFixture[str]) -> None:
    run_to_success("evaluate", capfd, *COMMON, "out=whole", "steps=[generate]")
    arguments = [*COMMON, "out=cut", "steps=[generate]"]
    process = start_command("experiments.evaluate", arguments, Path("output.txt"), {})
    while process.poll() is None and len(list(Path("cut").rglob("*.png"))) < 3:
        time.sleep(0.01)
    process.kill()
    assert 3 <= len(tree("cut")) - len(list(Path("cut").rglob("metadata.jsonl"))) < len(tree("whole"))
    run_to_success("evaluate", capfd, *COMMON, "out=cut", "steps=[generate]")
    assert tree("cut") == tree("whole")


def test_ones_own_prompts_give_pictures_and_a_sheet(capfd: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("a red circle\n\na blue square\n")
    options = [*COMMON, "benchmark=folder", "benchmark.file=prompts.txt"]
    run_to_success("evaluate", capfd, *options, "out=one")
    names = sorted(p.name for p in Path("one/folder").glob("*.png"))
    assert names == ["00000_0.png", "00000_1.png", "00001_0.png", "00001_1.png"]
    assert result("one")["pictures"] == 4
    assert Image.open("one/pictures.png").width > 100
    Path("texts").mkdir()
    Path("texts/cat.txt").write_text("a red circle")
    run_to_success("evaluate", capfd, *options, "benchmark.file=texts", "samples=1", "out=two")
    assert [p.name for p in Path("two/folder").glob("*.png")] == ["cat.png"]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve_endpoint(monkeypatch) as server:
        yield server


def write_imgedit(world: Path) -> list[str]:
    rows = {
        str(i): {"id": f"pictures/edit_{i:04d}.png", "prompt": f"make it {color}", "edit_type": kind}
        for i, (color, kind) in enumerate([("red", "adjust"), ("blue", "adjust"), ("green", "style")])
    }
    Path("edits.json").write_text(json.dumps(rows))
    Path("prompts.json").write_text(json.dumps({kind: "rate <edit_prompt>" for kind in ("adjust", "style")}))
    files = [
        "benchmark.file=edits.json",
        f"benchmark.images={world / 'benchmarks'}",
        "benchmark.questions=prompts.json",
    ]
    return ["benchmark=imgedit", *files, "judge=endpoint", "judge.max_retries=0", "judge.timeout=5"]


def test_edits_are_rated_and_what_the_judge_fails_at_is_counted_and_asked_again(
    in_world: Path, endpoint: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [*COMMON, *write_imgedit(in_world)]
    endpoint.answers = [make_completion("a: 5\nb: 4\nc: 4"), (500, "broken"), make_completion("a: 2")]
    run_to_success("evaluate", capfd, *options, "out=one")
    assert [len(r["messages"][0]["content"]) for r in endpoint.requests] == [3, 3, 3]  # text, source, edited
    report = result("one")
    assert (report["adjust"], report["style"], report["overall"]) == (4.33, 2.0, pytest.approx((4.33 + 2) / 2))
    assert list(report["failed"]) == ["1.png"]
    assert "1 edits without a rating are in no mean" in Path("one/report.md").read_text()
    assert "failed 1 instead of 0" in report["differences"]
    assert report["protocol_fields"]["judge"] == "m"  # what the endpoint reports, not what was asked for

    endpoint.answers = [make_completion("a: 1")]
    run_to_success("evaluate", capfd, *options, "out=one", "steps=[score,report]")
    assert len(endpoint.requests) == 4
    assert result("one")["mean over edits"] == pytest.approx((4.33 + 1 + 2) / 3)
    assert not result("one")["failed"]


def write_wise(file: Path) -> None:
    rows = [
        {"prompt_id": i, "Prompt": f"p{i}", "Explanation": "e", "Category": category}
        for i, category in {
            1: "Cultural knowledge",
            401: "time",
            568: "Space",
            701: "Biology",
            801: "Physical Knowledge",
            901: "Chemistry",
        }.items()
    ]
    file.write_text(json.dumps(rows))


def test_knowledge_is_rated(endpoint: Server, capfd: pytest.CaptureFixture[str]) -> None:
    write_wise(Path("wise.json"))
    endpoint.answers = [make_completion("Consistency: 2\nRealism: 1\nAesthetic Quality: 0")]
    run_to_success(
        "evaluate", capfd, *COMMON, "benchmark=wise", "benchmark.file=wise.json", "judge=endpoint", "out=one"
    )
    assert result("one")["overall"] == pytest.approx((0.7 * 2 + 0.2) / 2)
    assert len(endpoint.requests) == 6


LIKELY = {"Yes": -0.5, "one": -1.2, "No": -3.0}  # natural logarithms
MARKS = "<analysis>['','','']</analysis><score>[1,0,1]</score>"


@pytest.mark.parametrize(
    ("benchmark", "file", "reply", "name"),
    [
        ("geneval2", "geneval2/geneval2_data.jsonl", make_completion("Yes", LIKELY), "soft_tifa_gm"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("unigenbench", "unigenbench/test_prompts_en.csv", make_completion(MARKS), "overall"),
                ("corebench", "corebench/R-LR.json", make_completion("yes"), "reasoning"),
                ("longtext", "longtext/text_prompts.jsonl", make_completion("FRESH BREWS"), "overall"),
                ("wise_verified", "wise/verified", make_completion("Score: 1"), "culture"),
            )
        ),
    ],
)
def test_newer_benchmarks_are_drawn_judged_and_reported(
    benchmark: str, file: str, reply: dict, name: str, endpoint: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    endpoint.answers = [reply]
    options = [*COMMON, f"benchmark={benchmark}", f"benchmark.file={locate_published(file)}", "benchmark.limit=1"]
    options += ["benchmark.num_inference_steps=1", "judge=endpoint", "judge.max_retries=0"]
    run_to_success("evaluate", capfd, *options, "out=one")
    report = result("one")
    assert not report["failed"]
    assert report[name] > 0
    assert report["protocol_fields"]["judge"] == "m"
    assert "judge m instead of" in " ".join(report["differences"])
    # Every reply is kept: going on asks nothing.
    asked = len(endpoint.requests)
    run_to_success("evaluate", capfd, *options, "out=one", "steps=[score,report]")
    assert (len(endpoint.requests), result("one")) == (asked, report)


@pytest.mark.slow
def test_texts_are_read_on_this_machine_and_kept(capfd: pytest.CaptureFixture[str]) -> None:
    file = locate_published("longtext/text_prompts.jsonl")
    options = [*COMMON, "benchmark=longtext", f"benchmark.file={file}", "benchmark.limit=1", "judge=ocr", "out=one"]
    run_to_success("evaluate", capfd, *options)
    report = result("one")
    assert report["protocol_fields"]["judge"] == "PP-OCR"
    assert (report["overall"], report["pictures"], report["failed"]) == (0, 4, {})  # noise has no words
    assert len(Path("one/longtext.judged.jsonl").read_text().splitlines()) == 4
    text = run_to_message("evaluate", capfd, *options[:-2], "judge=template", "out=two")
    assert "LongText-Bench needs a judge that reads text, judge=ocr, qwen or endpoint" in text


@pytest.mark.slow  # a thousand pictures are judged
def test_a_run_that_follows_the_published_protocol_is_comparable_and_one_picture_less_isn_t(
    endpoint: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = locate_published("wise/verified")
    published = WISEVerified(name="wise_verified", file=str(folder))
    for target in published.targets:
        path = Path("one/wise_verified", target.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    Path("one/wise_verified.drawn.json").write_text(json.dumps({"cut": 0, "sampling": {"num_inference_steps": 30}}))
    # The published script isn't here, so what it asks, and with which settings, is said to be what we do.
    digest = published.describe_protocol([], JudgeFacts(), Drawn()).questions
    options = [*COMMON, "benchmark=wise_verified", f"benchmark.file={folder}", "judge=endpoint", "judge.max_retries=0"]
    settings = WISEVerified.published_manner.describe().replace("'", "\\'")  # type: ignore[union-attr]
    known = f"questions: '{digest}', judge_settings: '{settings}'"
    options += [f"benchmark.published_protocol={{{known}}}", "steps=[score,report]", "out=one"]
    endpoint.answers = [make_completion("Score: 1", model="Qwen3.5-35B-A3B")]
    run_to_success("evaluate", capfd, *options)
    text = Path("one/report.md").read_text()
    assert "Comparable with published numbers." in text
    assert "BAGEL, published" in text
    assert result("one")["comparable"]
    Path("one/wise_verified/7.png").unlink()
    run_to_success("evaluate", capfd, *options)
    text = Path("one/report.md").read_text()
    assert "Not comparable with published numbers: missing 1 instead of 0." in text
    assert "published |" not in text.split("| field")[0]


def test_a_detector_that_lacks_a_class_is_refused_before_anything_is_drawn(capfd: pytest.CaptureFixture[str]) -> None:
    row = {"tag": "colors", "prompt": "a red dog", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    Path("dogs.jsonl").write_text(json.dumps(row))
    text = run_to_message("evaluate", capfd, *COMMON, "benchmark.file=dogs.jsonl", "out=x")
    assert "the judge can't find dog, which dogs.jsonl asks for" in text
    assert not list(Path("x").rglob("*.png"))


def test_the_scores_are_logged_to_the_run_that_made_the_checkpoint(capfd: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    run_to_success("train", capfd, *FEW, "hydra.run.dir=logged", "callbacks.sample_grid.prompts=[]", "logger=mlflow")
    run_to_success("evaluate", capfd, *COMMON, "checkpoint=logged", "out=one")
    run_id = Path("logged/mlflow_run_id").read_text().strip()
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    metrics = client.get_run(run_id).data.metrics
    assert metrics["geneval/overall"] == result("one")["overall"]
    assert {"report.json", "report.md", "report.html"} <= {f.path for f in client.list_artifacts(run_id)}
    # Pictures that nobody knows the model of are scored, but not in the run that made this one.
    shutil.copytree("one/geneval", "two/geneval")
    shutil.rmtree("two/geneval/00000")
    run_to_success("evaluate", capfd, *COMMON, "checkpoint=logged", "out=two", "steps=[score,report]")
    assert "It isn't known which model drew the pictures of logged." in Path("two/report.md").read_text()
    assert client.get_run(run_id).data.metrics == metrics


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["benchmark=dpg", "benchmark.mode=strict"], "benchmark.mode must be official or fixed, got 'strict'"),
        (["benchmark=dpg", "benchmark.file=absent"], "benchmark.file=absent is neither a text file of prompts nor"),
        (["benchmark=dpg", "benchmark.questions=null", "steps=[score]"], "benchmark.questions is needed for scoring"),
        (["benchmark=tiif", "benchmark.file=absent"], "TIIF-Bench's folder absent has no *.jsonl file"),
        (["benchmark=wise", "benchmark.file=absent"], "WISE's prompts absent don't exist"),
        (["benchmark=folder", "benchmark.file=absent"], "benchmark.file=absent is neither a text file"),
        (["benchmark=imgedit"], "benchmark.file"),
        (["benchmark=dpg", "judge=endpoint", "steps=[score]"], "judge=endpoint needs OPENAI_BASE_URL"),
        (["judge=qwen", "judge.mllm=absent", "steps=[score]"], "judge.mllm=absent: no such folder"),
        (["benchmark=other"], "Could not find 'benchmark/other'"),
    ],
)
def test_bad_benchmarks_are_named(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert words in run_to_message("evaluate", capfd, *COMMON, "out=x", *arguments)

"""When a score may stand beside published ones: no field of its protocol differs, and what isn't known differs."""

from dataclasses import fields, replace
from typing import Any

import pytest
from PIL import Image

from tbac.evaluation.benchmarks.base import PictureBenchmark
from tbac.evaluation.benchmarks.geneval import GenEval
from tbac.evaluation.benchmarks.geneval2 import GenEval2
from tbac.evaluation.benchmarks.published import PROTOCOLS, PUBLISHED
from tbac.evaluation.benchmarks.rows import Drawn, Row
from tbac.evaluation.benchmarks.wise import WISE, WISEVerified
from tbac.evaluation.judges.base import JudgeFacts
from tbac.evaluation.protocol import FREE, OF_SERVICE, UNKNOWN, Protocol, is_comparable, list_differences
from tests.helpers.published import locate_published

SAMPLING = {"num_inference_steps": 30, "guidance_scale": 4.5, "seed": 42}


def follow(published: Protocol) -> Protocol:
    """A protocol that follows a published one in all fields."""
    choices = {part.name: getattr(published, part.name) for part in fields(Protocol)}
    chosen = {name: value[0] if isinstance(value, tuple) else value for name, value in choices.items()}
    return Protocol(**chosen | {"sampling": SAMPLING, "judge_settings": "s", "questions": "q"})


def flip(value: Any) -> Any:
    """Another value of a field, of the same kind."""
    return value + 1 if isinstance(value, int) else f"{value}, almost"


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("field", [part.name for part in fields(Protocol)])
def test_the_label_follows_from_the_fields_and_each_of_them_flips_it(name: str, field: str) -> None:
    published = replace(PROTOCOLS[name], judge_settings="s", questions="q")
    measured = follow(published)
    assert is_comparable(measured, published)
    # The published protocol says nothing of steps and guidance but that they are stated.
    changed = UNKNOWN if field == "sampling" else flip(getattr(measured, field))
    for value in (changed, UNKNOWN):
        other = replace(measured, **{field: value})
        assert not is_comparable(other, published)
        assert [difference.field for difference in list_differences(other, published)] == [field]
    assert not is_comparable(measured, None)


def test_only_the_sampling_is_left_to_the_model() -> None:
    assert {part.name for part in fields(Protocol) for p in PROTOCOLS.values() if getattr(p, part.name) == FREE} == {
        "sampling"
    }
    assert PUBLISHED.keys() <= PROTOCOLS.keys()


def read_verified(**options: Any) -> WISEVerified:
    return WISEVerified(name="wise_verified", file=str(locate_published("wise/verified")), **options)


def score_all(benchmark: PictureBenchmark, missing: int = 0) -> list[Row]:
    """Rows of a benchmark whose pictures are all there, or all but some."""
    rows = []
    for number, target in enumerate(benchmark.targets):
        state = "missing" if number < missing else "scored"
        rows.append(
            Row(target.path, benchmark.find_group(target), target.prompt, state, 1.0 if state == "scored" else None)
        )
    return rows


QWEN = JudgeFacts("Qwen3.5-35B-A3B", OF_SERVICE)


def differ(benchmark: PictureBenchmark, facts: JudgeFacts, rows: list[Row], drawn: Drawn) -> list[str]:
    """The fields in which a score isn't reached as published ones are."""
    published = benchmark.get_published()
    assert published is not None
    return [d.field for d in list_differences(benchmark.describe_protocol(rows, facts, drawn), published)]


def test_what_a_run_did_otherwise_is_named_and_nothing_else_is() -> None:
    benchmark, drawn = read_verified(), Drawn(0, SAMPLING)
    assert benchmark.manner is not None
    facts = replace(QWEN, settings=benchmark.get_published().judge_settings)  # type: ignore[union-attr]
    # Without the published script the judge is asked in our own words.
    assert differ(benchmark, facts, score_all(benchmark), drawn) == ["questions"]
    known = {"questions": benchmark.describe_protocol([], facts, drawn).questions}
    whole = read_verified(published_protocol=known)
    assert differ(whole, facts, score_all(whole), drawn) == []
    # The five cases in which it used to be "comparable" all the same.
    assert differ(whole, facts, score_all(whole, missing=500), drawn) == ["missing"]
    assert differ(whole, replace(facts, name="gpt-4.1-nano"), score_all(whole), drawn) == ["judge"]
    assert differ(whole, facts, score_all(whole), Drawn(3, SAMPLING)) == ["cut"]
    assert differ(whole, facts, score_all(whole), Drawn()) == ["cut", "sampling"]
    part = read_verified(published_protocol=known, limit=10)
    assert differ(part, facts, score_all(part), drawn) == ["prompts", "num_prompts"]


def test_rewritten_prompts_and_a_tiny_detector_are_told_by_their_digests() -> None:
    legacy = WISE(name="wise", file=str(locate_published("wise/legacy/cultural_common_sense_rewrite.json")))
    assert "prompts" in differ(legacy, JudgeFacts(), score_all(legacy), Drawn(0, SAMPLING))
    file = str(locate_published("geneval/evaluation_metadata.jsonl"))
    facts = JudgeFacts("Mask2Former and CLIP", "sha256:0 and sha256:1", "thresholds 0.3 and 0.9")
    geneval = GenEval(name="geneval", file=file, samples=4)
    assert differ(geneval, facts, score_all(geneval), Drawn(0, SAMPLING)) == ["judge_weights"]
    # Whoever has the published weights may say their digest.
    known = GenEval(name="geneval", file=file, samples=4, published_protocol={"judge_weights": "sha256:0 and sha256:1"})
    assert differ(known, facts, score_all(known), Drawn(0, SAMPLING)) == []
    with pytest.raises(ValueError, match="published_protocol has no field 'weights'"):
        GenEval(name="geneval", file=file, published_protocol={"weights": "x"})


def test_the_digests_of_geneval_2_are_of_the_published_file() -> None:
    benchmark = GenEval2(name="geneval2", file=str(locate_published("geneval2/geneval2_data.jsonl")))
    facts = JudgeFacts("Qwen/Qwen3-VL-8B-Instruct", OF_SERVICE, benchmark.get_published().judge_settings)  # type: ignore[union-attr]
    assert differ(benchmark, facts, score_all(benchmark), Drawn(0, SAMPLING)) == []


def test_a_benchmark_without_published_numbers_is_never_comparable() -> None:
    class Own(PictureBenchmark):
        needs = "nothing"

        def read_files(self) -> None: ...

        def list_targets(self) -> list:
            from tbac.evaluation.picture_tree import Target

            return [Target("a.png", "a", "a dog")]

        def judge_picture(self, target: Any, picture: Image.Image, judge: Any) -> Any: ...

    own = Own(name="own")
    assert own.get_published() is None
    assert not is_comparable(own.describe_protocol([], JudgeFacts(), Drawn(0, {})), own.get_published())

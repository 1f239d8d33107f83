"""WISE: the published files of both editions, their ratings, and their scores; neither passes for the other."""

import json
from pathlib import Path

import pytest

from tbac.evaluation.benchmarks.wise import LEGACY, VERIFIED, WISE, Edition, WISEVerified, read_wise
from tests.helpers.published import locate_published

FIRST = {"culture": 400, "time": 167, "space": 133, "biology": 100, "physics": 100, "chemistry": 100}
SECOND = {"culture": 400, "time": 120, "space": 120, "biology": 120, "physics": 120, "chemistry": 120}


@pytest.mark.parametrize(
    ("name", "edition", "counts"), [("wise/legacy", LEGACY, FIRST), ("wise/verified", VERIFIED, SECOND)]
)
def test_all_published_prompts_are_read_whatever_lies_beside_them(
    name: str, edition: Edition, counts: dict[str, int]
) -> None:
    rows = read_wise(locate_published(name), edition)
    assert [row.number for row in rows] == list(range(1, 1001))
    assert {c: sum(row.category == c for row in rows) for c in counts} == counts
    assert not any(row.prompt == "Mooncakes." for row in rows)  # as it is rewritten


def test_a_part_the_whole_and_the_rewritten_prompts_are_read_where_they_are_named() -> None:
    legacy, verified = locate_published("wise/legacy"), locate_published("wise/verified")
    assert len(read_wise(legacy / "natural_science.json")) == 300
    assert read_wise(legacy / "cultural_common_sense_rewrite.json")[0].prompt == "Mooncakes."
    assert read_wise(verified / "merge.json", VERIFIED) == read_wise(verified, VERIFIED)


def test_the_whole_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "merge.json").write_bytes((locate_published("wise/verified") / "merge.json").read_bytes())
    assert len(read_wise(tmp_path, VERIFIED)) == 1000


@pytest.mark.parametrize(
    ("name", "edition"),
    [
        ("legacy", VERIFIED),
        ("legacy/cultural_common_sense.json", VERIFIED),
        ("verified", LEGACY),
        ("verified/cultural_common_sense_verified.json", LEGACY),
        ("verified/merge.json", LEGACY),
    ],
)
def test_the_editions_can_t_be_mixed_up(name: str, edition: Edition) -> None:
    with pytest.raises(ValueError, match=r"wise_verified|_verified\.json"):
        read_wise(locate_published("wise") / name, edition)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Consistency: 2\nRealism: 1\nAesthetic Quality: 0", (2, 1, 0)),
        ("**Consistency:** 2\n**Realism:** 2\n**Aesthetic Quality:** 2", None),  # the colon stands within the asterisks
        ("**Consistency**: 2\n**Realism** : 2\n**Aesthetic Quality** 2", (2, 2, 2)),
        ("Consistency: 10\nRealism: 1\nAesthetic Quality: 0", (1, 1, 0)),  # only the digit is looked at
        ("consistency: 1, realism: 0, aesthetic quality: 1", (1, 0, 1)),
        ("Consistency: 0\nRealism: 0\nAesthetic Quality: 0\nConsistency: 2", (2, 0, 0)),
        ("2\n1\n0", (2, 1, 0)),
        ("Consistency: 2\nRealism: 1", None),
        ("Consistency: 3\nRealism: 1\nAesthetic Quality: 0", None),
        ("nothing", None),
        ("1\n2", None),
    ],
)
def test_three_ratings(reply: str, expected: tuple[int, int, int] | None) -> None:
    found = LEGACY.read_ratings(reply)
    assert (found and tuple(found[name] for name in LEGACY.ratings)) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Score: 1", 1),
        ("**Score**: 0", 0),
        ("score 1", 1),
        ("1", 1),
        ("1\n0", None),
        ("Score: 2", None),
        ("yes", None),
        ("Score: 10", None),
        ("Score: 1\nno, score: 0", 1),
        ("Score: 2, so score 1", 1),
    ],
)
def test_one_rating(reply: str, expected: int | None) -> None:
    found = VERIFIED.read_ratings(reply)
    assert (found and found["score"]) == expected


def test_scores_and_their_weights() -> None:
    assert LEGACY.compute_score({"consistency": 2, "realism": 2, "aesthetic quality": 2}) == 1  # and not a little less
    assert LEGACY.compute_score({"consistency": 1, "realism": 0, "aesthetic quality": 2}) == pytest.approx(0.45)
    assert VERIFIED.compute_score({"score": 1}) == 1
    names = tuple(LEGACY.shares)
    legacy = WISE(name="wise", file=str(locate_published("wise/legacy")))
    published = dict(zip(names, (0.56, 0.55, 0.62, 0.49, 0.63, 0.41), strict=True))  # MetaQuery-XL: 0.55
    assert round(legacy.combine(published)["overall"], 2) == 0.55
    assert "overall" not in legacy.combine({"time": 1.0})
    verified = WISEVerified(name="wise_verified", file=str(locate_published("wise/verified")))
    bagel = dict(zip(names, (0.78, 0.6333, 0.5667, 0.3750, 0.55, 0.5083), strict=True))  # with thoughts: 0.6280
    assert verified.combine(bagel)["overall"] == pytest.approx(0.6280, abs=1e-4)
    with pytest.raises(ValueError, match="no picture"):
        legacy.summarize([], "j")


def row(number: int, category: str) -> dict:
    return {"prompt_id": number, "Prompt": f"p{number}", "Explanation": "e", "Category": category}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "isn't JSON"),
        ("{}", "must hold a list"),
        (json.dumps([{"prompt_id": 1}]), "needs 'Prompt' as str"),
        (json.dumps([row(1, "sports")]), "has the category 'sports', where the first edition has culture"),
        (json.dumps([row(1001, "time")]), "needs a 'prompt_id' from 1 to 1000, got 1001"),
        (json.dumps([row(401, "time"), row(401, "time")]), "several prompts have the prompt_id 401"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_wise(tmp_path)
    with pytest.raises(ValueError, match="don't exist"):
        read_wise(tmp_path / "absent")


def test_rewritten_prompts_are_read_where_they_are_named_or_lie_alone(tmp_path: Path) -> None:
    folder = locate_published("wise/legacy")
    for file in folder.glob("*_rewrite.json"):
        (tmp_path / file.name).symlink_to(file)
    rewritten, plain = read_wise(tmp_path), read_wise(folder)
    assert [p.number for p in rewritten] == [p.number for p in plain] == list(range(1, 1001))
    assert [p.category for p in rewritten] == [p.category for p in plain]
    assert sum(a.prompt != b.prompt for a, b in zip(rewritten, plain, strict=True)) > 900
    assert len(read_wise(folder / "natural_science_rewrite.json")) == 300

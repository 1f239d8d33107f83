"""WISE: its files, ratings and WiScore."""

import json
from pathlib import Path

import pytest

from tbac.evaluation.benchmarks.wise import (
    WisePrompt,
    aggregate_wise,
    compute_wiscore,
    list_wise_targets,
    read_ratings,
    read_wise,
)


def row(number: int, category: str, subcategory: str = "") -> dict:
    return {
        "prompt_id": number, "Prompt": f"p{number}", "Explanation": "e", "Category": category,
        "Subcategory": subcategory,
    }  # fmt: skip


def test_categories_are_found_and_pictures_named_by_number(tmp_path: Path) -> None:
    rows = [
        row(3, "Cultural knowledge", "Festival"),
        row(1, "Natural science", "Biology"),
        row(2, "time", "Horizontal time"),
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows[:1]))
    (tmp_path / "b.json").write_text(json.dumps(rows[1:]))
    found = read_wise(tmp_path)
    assert [(k.number, k.category) for k in found] == [(1, "biology"), (2, "time"), (3, "culture")]
    assert [target.path for target in list_wise_targets(found)] == ["1.png", "2.png", "3.png"]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Consistency: 2\nRealism: 1\nAesthetic Quality: 0", (2, 1, 0)),
        ("**Consistency:** 2\n**Realism:** 2\n**Aesthetic Quality:** 2", (2, 2, 2)),
        ("consistency = 1, realism = 0, aesthetic quality = 1", (1, 0, 1)),
        ("Consistency: 2\nRealism: 1", None),
        ("Consistency: 3\nRealism: 1\nAesthetic Quality: 0", None),
        ("Consistency: 10\nRealism: 1\nAesthetic Quality: 0", None),
        ("nothing", None),
    ],
)
def test_ratings(reply: str, expected: tuple[int, int, int] | None) -> None:
    found = read_ratings(reply)
    assert (found and tuple(found.values())) == expected


def test_wiscore_and_its_weights() -> None:
    assert compute_wiscore({"consistency": 2, "realism": 2, "aesthetic quality": 2}) == pytest.approx(1)
    assert compute_wiscore({"consistency": 1, "realism": 0, "aesthetic quality": 2}) == pytest.approx(0.45)
    names = ("culture", "time", "space", "biology", "physics", "chemistry")
    rows = [WisePrompt(i, "p", "e", name) for i, name in enumerate(names)]
    published = dict(enumerate((0.56, 0.55, 0.62, 0.49, 0.63, 0.41)))  # MetaQuery-XL: 0.55
    assert round(aggregate_wise(published, rows)["overall"], 2) == 0.55
    assert "overall" not in aggregate_wise({0: 1.0}, rows)
    with pytest.raises(ValueError, match="no picture"):
        aggregate_wise({}, rows)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "isn't JSON"),
        ("{}", "must hold a list"),
        (json.dumps([{"prompt_id": 1}]), "needs 'Prompt' as str"),
        (json.dumps([row(1, "sports")]), "has the category 'sports'"),
        (json.dumps([row(1, "time"), row(1, "time")]), "several prompts have the prompt_id 1"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_wise(tmp_path)
    with pytest.raises(ValueError, match="don't exist"):
        read_wise(tmp_path / "absent")

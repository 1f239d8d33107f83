"""DPG-Bench's rules: chains of questions, the official scorer's quirks, and what is missing."""

from pathlib import Path
from random import Random

import pytest

from tbac.evaluation.benchmarks.dpg import (
    DPG,
    DenseScore,
    Mode,
    Question,
    aggregate_dense,
    apply_dependencies,
    read_dpg_questions,
)
from tbac.evaluation.benchmarks.rows import Row, compute_means

HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)


def q(number: int, *parents: int, category: str = "entity - whole") -> Question:
    return Question(number, f"question {number}?", parents, category)


CHAIN = [q(1), q(2, 1), q(3, 2), q(4)]  # 3 needs 2, which needs 1
BACKWARDS = [q(1, 2), q(2, 3), q(3)]  # each stands before the one it needs


@pytest.mark.parametrize(
    ("questions", "answers", "official", "fixed"),
    [
        (CHAIN, "1111", "1111", "1111"),
        (CHAIN, "0111", "0001", "0001"),  # a cascade
        (CHAIN, "1011", "1001", "1001"),
        (CHAIN, "1101", "1101", "1101"),
        (CHAIN, "1110", "1110", "1110"),
        (CHAIN, "0000", "0000", "0000"),
        (CHAIN, "0101", "0001", "0001"),
        (CHAIN, "0011", "0001", "0001"),
        (BACKWARDS, "111", "111", "111"),
        (BACKWARDS, "110", "100", "000"),  # the official scorer looks at 1 before it has looked at 2
        (BACKWARDS, "101", "001", "001"),
        (BACKWARDS, "011", "011", "011"),
        (BACKWARDS, "010", "000", "000"),
        ([q(1), q(2), q(3, 1, 2)], "111", "111", "111"),  # two parents
        ([q(1), q(2), q(3, 1, 2)], "011", "010", "010"),
        ([q(1), q(2), q(3, 1, 2)], "101", "100", "100"),
        ([q(1), q(2), q(3, 1, 2)], "001", "000", "000"),
        ([q(1)], "1", "1", "1"),
        ([q(1)], "0", "0", "0"),
        ([q(5), q(9, 5)], "01", "00", "00"),  # numbers with gaps
    ],
)
def test_dependencies(questions: list[Question], answers: str, official: str, fixed: str) -> None:
    right = {question.number: answer == "1" for question, answer in zip(questions, answers, strict=True)}
    for mode, expected in (("official", official), ("fixed", fixed)):
        found = apply_dependencies(right, questions, mode)  # type: ignore[arg-type]
        assert "".join(str(int(found[question.number])) for question in questions) == expected


def test_circles_and_absent_parents_are_named() -> None:
    right = {1: True, 2: True}
    with pytest.raises(ValueError, match="1, 2, 1 depend on each other in a circle"):
        apply_dependencies(right, [q(1, 2), q(2, 1)])
    with pytest.raises(ValueError, match="question 2 depends on question 7, which isn't there"):
        apply_dependencies(right, [q(1), q(2, 7)])


def score(mode: Mode, **answers: list[str]) -> DenseScore:
    questions = {"a": [q(1), q(2, 1, category="attribute - color")], "b": [q(1), q(2, category="relation - spatial")]}
    pictures = {k: [{i + 1: c == "1" for i, c in enumerate(p)} for p in v] for k, v in answers.items()}
    return aggregate_dense(pictures, questions, mode)


def test_the_score_is_a_mean_of_prompts_and_pictures() -> None:
    both = score("fixed", a=["11", "01"], b=["10", "10"])
    assert both.overall == pytest.approx(100 * ((1 + 0) / 2 + 0.5) / 2)
    assert both.categories == {"entity": 75.0, "attribute": 50.0, "relation": 0.0}
    assert score("official", a=["11", "01"], b=["10", "10"]).overall == both.overall


def test_official_categories_are_of_the_last_picture_without_dependencies() -> None:
    official = score("official", a=["11", "01"], b=["10", "11"])
    assert official.categories == {"entity": 50.0, "attribute": 100.0, "relation": 100.0}


def test_a_prompt_without_a_picture_counts_as_wrong_and_officially_not_at_all() -> None:
    fixed, official = score("fixed", a=["11"]), score("official", a=["11"])
    assert (fixed.overall, fixed.missing, fixed.prompts) == (50.0, ["b"], 2)
    assert (official.overall, official.missing, official.prompts) == (100.0, ["b"], 1)


def test_without_any_picture_there_is_no_official_score() -> None:
    with pytest.raises(ValueError, match="no prompt"):
        score("official")
    assert score("fixed").overall == 0.0


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


def test_the_official_reader_loses_the_first_question_and_with_it_its_prompt(tmp_path: Path) -> None:
    file = write(
        tmp_path / "dpg.csv",
        "p0,text,,1,0,entity,whole,entity - whole (cat),Is there a cat?",
        'p0,text,,2,"1",attribute,color,attribute - color (cat; red),Is the cat red?',
        "p1,text,,1,0,entity,whole,entity - whole (dog),Is there a dog?",
        'p1,text,,2,"0, 1",relation,spatial,relation - spatial (dog; left),Is the dog left?',
    )
    fixed, official = read_dpg_questions(file), read_dpg_questions(file, "official")
    assert [len(v) for v in fixed.values()] == [2, 2]
    assert [len(v) for v in official.values()] == [1, 2]
    assert fixed["p1"][1].parents == (1,)
    assert fixed["p0"][1].category == "attribute - color"
    answers = {"p0": [{1: True, 2: True}], "p1": [{1: True, 2: True}]}
    own = {"p0": [{2: True}], "p1": answers["p1"]}
    assert aggregate_dense(answers, fixed, "fixed").prompts == 2
    assert aggregate_dense(own, official, "official").dropped == ["p0"]


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="don't exist"):
        read_dpg_questions(tmp_path / "x.csv")
    (tmp_path / "y.csv").write_text("item_id,text\na,b\n")
    with pytest.raises(ValueError, match="lacks the columns dependency, proposition_id"):
        read_dpg_questions(tmp_path / "y.csv")
    with pytest.raises(ValueError, match=r"z.csv:2: proposition_id and dependency must be whole numbers, got 'one'"):
        read_dpg_questions(write(tmp_path / "z.csv", "p0,t,,one,0,e,w,e (x),Q?"))


@pytest.mark.parametrize("mode", ["official", "fixed"])
def test_the_means_that_intervals_come_from_are_the_scores(tmp_path: Path, mode: Mode) -> None:
    (tmp_path / "prompts").mkdir()
    lines = [HEADER, "skipped,,,1,0,,,other (x),a?"]
    rng = Random(0)
    for stem in ("a", "b", "c"):
        (tmp_path / "prompts" / f"{stem}.txt").write_text(stem)
        for number in range(1, rng.randint(3, 6)):
            lines.append(f"{stem},,,{number},{rng.randrange(number)},,,entity - {rng.choice('xy')} (z),q{number}?")
    (tmp_path / "q.csv").write_text("\n".join(lines))
    benchmark = DPG(name="dpg", file=str(tmp_path / "prompts"), questions=str(tmp_path / "q.csv"), mode=mode)
    rows = []
    for target in benchmark.targets:
        numbers = [str(question.number) for question in benchmark.questions_by_mode["fixed"][target.item]]
        answers = [{number: rng.random() < 0.6 for number in numbers}] * 4  # four alike: then categories agree too
        rows.append(Row(target.path, "", target.prompt, "scored", 0.5, "", {"answers": answers}))
    scores = benchmark.summarize(rows, "j").scores
    means = compute_means([count for row in rows for count in benchmark.count(row)])
    assert benchmark.combine(means) == pytest.approx(dict(scores))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["a,x,,1,0,,,t,q?", "a,x,,2,3,,,t,q?"], "prompt 'a': question 2 depends on question 3, which isn't there"),
        (["a,x,,1,2,,,t,q?", "a,x,,2,1,,,t,q?"], "prompt 'a': questions 1, 2, 1 depend on each other in a circle"),
        (["a,x,,1,0,,,t,q?", "a,x,,1,0,,,t,r?"], "prompt 'a' has several questions with the proposition_id 1"),
    ],
)
def test_questions_that_no_score_could_come_from_are_named_before_anything_is_drawn(
    rows: list[str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.txt").write_text("a dog")
    (tmp_path / "q.csv").write_text("\n".join([HEADER, '"b",x,,1,7,,,t,of no prompt', *rows]))
    file, questions = str(tmp_path / "p"), str(tmp_path / "q.csv")
    with pytest.raises(ValueError, match=words):
        DPG(name="dpg", file=file, questions=questions)
    assert DPG(name="dpg", file=file, questions=questions, mode="official").targets

"""Rewards: the same scores as the benchmarks', what happens when a judge fails, and that chance knows nothing."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.training_run import build_reinforcement
from tbac.evaluation.benchmarks.dpg import DPG
from tbac.evaluation.benchmarks.edits import Edits
from tbac.evaluation.benchmarks.geneval import GenEval
from tbac.evaluation.detectors.template import TemplateDetector
from tbac.evaluation.judges.base import JudgeError
from tbac.evaluation.judges.endpoint import EndpointJudge
from tbac.evaluation.rewards import BenchmarkReward, JudgeReward, RandomReward
from tbac.pictures import open_picture
from tbac.types import PicturePrompt, RewardError
from tests.helpers.configs import compose_config
from tests.helpers.endpoint import Server, make_completion, serve_endpoint
from tests.helpers.pictures import make_noise_image


@pytest.fixture
def folder(in_world: Path) -> Path:
    return in_world / "rewards"


@pytest.fixture
def detector(folder: Path) -> TemplateDetector:
    return TemplateDetector.from_world(folder / "world.json")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve_endpoint(monkeypatch) as running:
        yield running


def list_pictures(world: Path, count: int = 12) -> list[Image.Image]:
    return [open_picture(path) for path in sorted((world / "benchmarks" / "pictures").glob("*.png"))[:count]]


def test_a_benchmark_s_reward_is_its_verdict(folder: Path, in_world: Path, detector: TemplateDetector) -> None:
    benchmark = GenEval(name="g", file=str(folder / "geneval.jsonl"), samples=3)
    reward = BenchmarkReward(benchmark, detector, threads=2)
    prompts = reward.list_prompts()
    assert [prompt.text for prompt in prompts] == [row["prompt"] for row in benchmark.prompts]
    pictures = list_pictures(in_world)
    for prompt, row in zip(prompts, benchmark.prompts, strict=True):
        targets = [target for target in benchmark.targets if target.prompt == row["prompt"]]
        expected = [benchmark.judge_picture(targets[0], picture, detector).score for picture in pictures]
        assert reward.score([prompt] * len(pictures), pictures) == expected


def test_dense_prompts_are_scored_by_the_rules_for_a_grid_of_equal_pictures(
    folder: Path, in_world: Path, detector: TemplateDetector
) -> None:
    benchmark = DPG(name="d", file=str(folder / "dense/prompts"), questions=str(folder / "dense/questions.csv"))
    reward = BenchmarkReward(benchmark, detector)
    scores = []
    for picture in list_pictures(in_world, 4):
        grid = Image.new("RGB", (2 * picture.width, 2 * picture.height))
        for place in ((0, 0), (1, 0), (0, 1), (1, 1)):
            grid.paste(picture, (place[0] * picture.width, place[1] * picture.height))
        judge = reward.judge
        for target in benchmark.targets:
            rows = list(benchmark.judge_pictures(lambda other, t=target, g=grid: g if other == t else None, judge))
            of_target = next(row for row in rows if row.picture == target.path)
            expected = benchmark._compute_scores("fixed", {target.item: _read(of_target)}, set(), [target.item]).overall
            scores += reward.score([PicturePrompt(target.prompt)], [picture])
            assert 100 * scores[-1] == pytest.approx(expected)
    assert len(set(scores)) > 2


def _read(row: Any) -> list[dict[int, bool]]:
    return [{int(number): answer for number, answer in one.items()} for one in row.details["answers"]]


def test_edits_are_told_apart_by_their_source(folder: Path, detector: TemplateDetector) -> None:
    benchmark = Edits(name="e", file=str(folder / "edits.jsonl"))
    reward = BenchmarkReward(benchmark, detector)
    prompts = reward.list_prompts()
    assert len(prompts) == len(benchmark.edits)
    for prompt, edit in zip(prompts, benchmark.edits, strict=True):
        assert prompt == PicturePrompt(edit["instruction"], (folder / edit["image"],))
        # The source itself is no edit of itself.
        assert reward.score([prompt], [open_picture(prompt.images[0])]) == [0.0]


def test_a_benchmark_of_grids_can_t_be_a_reward(folder: Path, detector: TemplateDetector) -> None:
    class Grids(GenEval):
        def list_targets(self) -> Any:
            return [type(t)(t.path, t.item, t.prompt, (0, 1, 2, 3)) for t in super().list_targets()]

    reward = BenchmarkReward(Grids(name="g", file=str(folder / "geneval.jsonl"), title="Grids"), detector)
    with pytest.raises(ValueError, match="Grids judges grids of 4 pictures"):
        reward.score(reward.list_prompts()[:1], [make_noise_image(1)])


def test_a_detector_that_can_t_answer_is_an_error_now_and_not_a_pause(folder: Path, detector: TemplateDetector) -> None:
    benchmark = DPG(name="d", file=str(folder / "dense/prompts"), questions=str(folder / "dense/questions.csv"))
    reward = BenchmarkReward(benchmark, detector)
    reward.judge.ask = lambda question, images: (_ for _ in ()).throw(JudgeError("no such question"))
    with pytest.raises(ValueError, match="no such question"):
        reward.score(reward.list_prompts()[:1], [make_noise_image(1)])


def test_a_judge_says_whether_or_how_likely_a_picture_shows_its_prompt(server: Server) -> None:
    judge = EndpointJudge("m", max_retries=0, timeout=2)
    prompt = PicturePrompt("a {red} cat")
    server.answers = [make_completion("Yes, it does."), make_completion("no")]
    pictures = [make_noise_image(1), make_noise_image(2)]
    assert JudgeReward(judge, probability=False).score([prompt] * 2, pictures) == [1.0, 0.0]
    assert '"a {red} cat"' in server.requests[0]["messages"][0]["content"][0]["text"]
    server.answers = [make_completion("Yes", {"Yes": np.log(0.7), "No": np.log(0.2)})]
    assert JudgeReward(judge).score([prompt], pictures[:1]) == pytest.approx([0.7])


def test_an_endpoint_that_is_down_may_be_asked_again_about_the_rest_alone(server: Server) -> None:
    reward = JudgeReward(EndpointJudge("m", max_retries=0, timeout=2), probability=False)
    prompts, pictures = [PicturePrompt("a cat")] * 3, [make_noise_image(i) for i in range(3)]
    server.answers = [make_completion("yes"), (503, "down")]
    with pytest.raises(RewardError):
        reward.score(prompts, pictures)
    asked = len(server.requests)
    server.answers = [make_completion("no")]
    assert reward.score(prompts, pictures) == [1.0, 0.0, 0.0]
    assert len(server.requests) == asked + 2


def test_an_endpoint_that_refuses_may_be_asked_again_too(server: Server) -> None:
    """A key may be put right while a run waits."""
    reward = JudgeReward(EndpointJudge("m", max_retries=0, timeout=2), probability=False)
    server.answers = [(401, {"error": {"message": "who are you"}})]
    with pytest.raises(RewardError, match="check OPENAI_API_KEY"):
        reward.score([PicturePrompt("a cat")], [make_noise_image(1)])


def test_a_picture_without_a_usable_reply_has_no_score(server: Server) -> None:
    reward = JudgeReward(EndpointJudge("m", max_retries=0, timeout=2), probability=False, tries=2)
    server.answers = [make_completion("maybe"), make_completion("perhaps"), make_completion("yes")]
    assert reward.score([PicturePrompt("a cat")] * 2, [make_noise_image(1), make_noise_image(2)]) == [None, 1.0]


class Any_:  # noqa: N801
    def list_prompts(self) -> Sequence[PicturePrompt]:
        return [PicturePrompt("a"), PicturePrompt("b")]


def test_chance_depends_on_the_picture_alone_and_on_nothing_in_it() -> None:
    pictures = [make_noise_image(i) for i in range(400)]
    prompts = [PicturePrompt("a")] * 400
    scores = RandomReward(Any_()).score(prompts, pictures)
    assert RandomReward(Any_()).score(prompts[::-1], pictures[::-1]) == scores[::-1]
    assert RandomReward(Any_(), seed=1).score(prompts, pictures) != scores
    assert np.mean(scores) == pytest.approx(0.5, abs=0.06)
    brightness = [float(np.asarray(picture).mean()) for picture in pictures]
    assert abs(np.corrcoef(scores, brightness)[0, 1]) < 0.15
    coins = RandomReward(Any_(), levels=2).score(prompts, pictures)
    assert set(coins) == {0.0, 1.0}
    assert RandomReward(Any_()).list_prompts() == Any_().list_prompts()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: JudgeReward(TemplateDetector), "needs a judge that has compute_probability"),
        (lambda: JudgeReward(type("J", (), {"ask": 1}), probability=True), "compute_probability"),
        (lambda: JudgeReward(type("J", (), {"ask": 1}), "good?", False), "must have {prompt}"),
        (lambda: JudgeReward(type("J", (), {"ask": 1}), probability=False, threads=0), "threads"),
        (lambda: RandomReward(Any_(), levels=1), "levels"),
        (lambda: BenchmarkReward(5, 5), "got int"),  # type: ignore[arg-type]
    ],
)
def test_what_can_t_be_a_reward_is_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.usefixtures("in_world")
def test_the_control_by_chance_has_the_prompts_of_the_reward_that_it_controls_and_its_run_s_seed() -> None:
    overrides = ("run_dir=.", "stage=reinforce", "seed=7")
    (rule,), (chance,) = (
        build_reinforcement(compose_config("train", *overrides, f"reward={name}"))[0].rewards
        for name in ("shapes_reinforce", "shapes_random")
    )
    assert chance.reward.list_prompts() == rule.reward.list_prompts()
    assert (chance.reward.seed, chance.reward.levels) == (7, 2)  # type: ignore[attr-defined]


CLOSED = ("shapes_reinforce", "shapes_dense", "shapes_words", "shapes_edits", "words_reinforce")


@pytest.mark.usefixtures("in_world")
@pytest.mark.parametrize("name", CLOSED)
def test_the_closed_worlds_rewards_can_be_built_and_have_prompts(name: str) -> None:
    (callback,) = build_reinforcement(compose_config("train", "run_dir=.", "stage=reinforce", f"reward={name}"))
    assert len(callback.rewards) == 1
    assert callback.order is not None
    prompts = callback.order.prompts
    assert len(prompts) >= 5
    score = callback.rewards[0].reward.score(prompts[:1], [Image.new("RGB", (24, 24))])[0]
    assert score is not None
    assert score < 0.5

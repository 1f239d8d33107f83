"""The stage of reinforcement: what it repeats exactly, what it never touches, what it learns, and how it waits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from experiments.studies.faults.runs import are_identical
from tbac.models import UniImage
from tbac.models.lora import is_adapter
from tbac.models.saved import read_checkpoint
from tbac.training.callbacks.guard import Guard
from tbac.training.callbacks.reinforce import Reinforce
from tbac.training.groups import DrawingOptions, PromptOrder
from tbac.training.policies import Policy
from tbac.training.reinforce_options import ReinforceOptions, Rounds
from tbac.training.rewarding import WeightedReward, collect_prompts
from tbac.training.spikes import Verdict
from tbac.types import PicturePrompt
from tests.helpers.commands import run_to_message, run_to_success
from tests.helpers.rewards import REINFORCE, Redness
from tests.helpers.shared import build_once
from tests.helpers.training import make_data, make_module, make_trainer
from tests.helpers.worlds import load_all_parts, load_small_model

ROUND = [
    "stage.reinforce.rounds={steps: 4, decay: 0.6, decay_growth: 0.3}", "stage.accumulate=2", "stage.batch_size=1",
    "stage.reinforce.loss.kl_weight=0.1", "stage.reinforce.supervised_weight=0.5",
]  # fmt: skip
LAST = Path("checkpoints") / "reinforce-step=6.ckpt"


class Mute(Redness):
    """Gives all pictures the same score."""

    def score(self, prompts: Sequence[PicturePrompt], pictures: Sequence[Any]) -> list[float]:
        return [0.5 for _ in pictures]


def make_reinforce(reward: Any = None, **options: Any) -> Reinforce:
    drawing = DrawingOptions(group_size=4, num_inference_steps=2)
    made = ReinforceOptions(**{"drawing": drawing, **options})
    return Reinforce([WeightedReward("red", reward or Redness())], made)


def reinforce(model: UniImage, callback: Reinforce, steps: int = 4, *others: L.Callback, **options: Any) -> Any:
    """Train a model in this process; returns the module."""
    module = make_module(model, name="reinforce", steps=steps, weight_decay=0.0, **options)
    trainer = make_trainer(steps, callbacks=[callback, *others], gradient_clip_val=1.0)
    trainer.fit(module, datamodule=make_data(model, "stage.batch_size=2", "stage.dropout.caption_drop_prob=0"))
    return module


def copy_weights(module: Any) -> list[Tensor]:
    return [parameter.detach().clone() for _, parameter in module.list_trained()]


def assert_equal(ones: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


class Follow(L.Callback):
    """Keeps the weights of the trained and of the old policy after each step."""

    def __init__(self, callback: Reinforce) -> None:
        self.callback = callback
        self.trained: list[list[Tensor]] = []
        self.old: list[list[Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.note(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.note(pl_module)

    def note(self, module: Any) -> None:
        self.trained.append(copy_weights(module))
        self.old.append([weights.clone() for weights in self.callback.policies["old"].weights])


def assert_runs_equal(one: Path, other: Path) -> None:
    """Assert that the last checkpoints agree in every bit of weights, policies, optimizer, position and callbacks."""
    whole, again = read_checkpoint(one / LAST), read_checkpoint(other / LAST)
    assert set(whole["policies"]) == {"old", "reference"}
    parts = (
        "state_dict", "current_model_state", "policies", "optimizer_states", "lr_schedulers", "StagedDataModule",
    )  # fmt: skip
    for part in parts:
        assert are_identical(whole[part], again[part]), part
    for name in whole["callbacks"]:
        if name.split("{")[0] in ("Reinforce", "Guard"):
            assert are_identical(whole["callbacks"][name], again["callbacks"][name]), name


@pytest.fixture
def whole_run(in_world: Path, session_folder: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    """The run folder of one and a half rounds that nothing stopped; trained once in a session."""

    def train(folder: Path) -> None:
        run_to_success("train", capfd, *REINFORCE, *ROUND, f"hydra.run.dir={folder}")

    return build_once(session_folder / "reinforced", train)


# What is exact.


def test_going_on_in_the_middle_of_a_round_equals_never_having_stopped(
    whole_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for end in ("trainer.max_steps=2", "trainer.max_steps=-1"):
        run_to_success("train", capfd, *REINFORCE, *ROUND, end, "hydra.run.dir=twice")
    assert_runs_equal(whole_run, Path("twice"))
    policies = read_checkpoint(whole_run / LAST)["policies"]
    assert not are_identical(policies["old"], policies["reference"])


@pytest.mark.slow
def test_policies_are_adapters_where_these_train(in_world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lora = "model.lora.rank=2"
    run_to_success("train", capfd, *REINFORCE, *ROUND, lora, "hydra.run.dir=whole")
    for end in ("trainer.max_steps=2", "trainer.max_steps=-1"):
        run_to_success("train", capfd, *REINFORCE, *ROUND, lora, end, "hydra.run.dir=twice")
    assert_runs_equal(Path("whole"), Path("twice"))
    names = {name for name in read_checkpoint(Path("whole") / LAST)["policies"]["old"] if name.startswith("denoiser.")}
    assert names
    assert all(map(is_adapter, names))


@pytest.mark.slow
def test_after_other_stages_in_one_process_it_is_as_a_job_of_its_own(
    in_world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    few = ["world=shapes", "debug=few_steps", "callbacks.sample_grid.prompts=[]", "stage.batch_size=2", "stage.steps=3"]
    drawing = "stage.reinforce.drawing={group_size: 3, num_inference_steps: 2, scheduler: null}"
    own = ["~reward", "+reward={red: {_target_: tests.helpers.rewards.Redness}}", drawing]
    both = ["stages=[t2i_pretrain,reinforce]", f"+stage_overrides.reinforce={own}"]
    run_to_success("train", capfd, *few, *both, "hydra.run.dir=one")
    run_to_success("train", capfd, *few, "stage=t2i_pretrain", "hydra.run.dir=first")
    run_to_success("train", capfd, *few, "stage=reinforce", *own, "init=first", "hydra.run.dir=second")
    one, second = read_checkpoint("one"), read_checkpoint("second")
    assert one["tbac"]["stage"] == "reinforce"
    for part in ("state_dict", "policies", "optimizer_states"):
        assert are_identical(one[part], second[part]), part


def test_the_old_policy_follows_after_each_round(model: UniImage) -> None:
    callback = make_reinforce(rounds=Rounds(steps=2, decay=0.3, decay_growth=0.2))
    follow = Follow(callback)
    reinforce(model, callback, 6, follow)
    expected = follow.old[0]
    assert_equal(expected, follow.trained[0])
    for step in range(1, 7):
        if step % 2 == 0:
            keep = min(0.3, 0.2 * (step // 2 - 1))
            pairs = zip(expected, follow.trained[step], strict=True)
            expected = [keep * old + (1 - keep) * new for old, new in pairs]
        for found, wanted in zip(follow.old[step], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert (callback.round, callback.round_steps) == (3, 0)


def test_no_bit_of_the_frozen_parts_changes_and_it_answers_as_before(model: UniImage) -> None:
    before = {name: tensor.clone() for name, tensor in load_all_parts(model).state_dict().items()}
    answers = model.answer(["what color is the circle?"], None, 4)
    module = reinforce(model, make_reinforce())
    for name, tensor in model.state_dict().items():
        if name.startswith(("mllm.", "autoencoder.")):
            assert torch.equal(tensor, before[name]), name
    assert model.answer(["what color is the circle?"], None, 4) == answers
    assert all(not torch.equal(p, before[name]) for name, p in module.list_trained())
    assert module.objective is None


def test_scores_without_spread_move_nothing(model: UniImage) -> None:
    follow = Follow(callback := make_reinforce(Mute()))
    reinforce(model, callback, 2, follow)
    assert_equal(follow.trained[0], follow.trained[-1])


def test_another_policy_acts_within_its_block_alone(model: UniImage) -> None:
    module = make_module(model)
    policy, weights = Policy(module), copy_weights(module)
    for own in policy.weights:
        own.mul_(2)

    def act() -> None:
        with policy.act(module):
            assert_equal(copy_weights(module), [2 * each for each in weights])
            assert not torch.is_grad_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        act()
    assert_equal(copy_weights(module), weights)
    assert_equal(policy.weights, [2 * each for each in weights])


def test_autocast_sees_the_weights_of_the_policy_that_acts(model: UniImage) -> None:
    """It keeps copies of weights in bf16, which would be those of the policy before, and without a gradient."""
    module = make_module(model)
    inputs = model.prompt(["a red circle"])
    noisy, sigma = torch.randn(1, model.latent_channels, 6, 6), torch.tensor([0.5])
    policy = Policy(module)
    for own in policy.weights:
        own.mul_(1.5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = module.predict_velocity(inputs, noisy, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        with policy.act(module):
            other = module.predict_velocity(inputs, noisy, sigma)
        found = module.predict_velocity(inputs, noisy, sigma)
    assert torch.equal(found, expected)
    assert not torch.allclose(other, expected, rtol=0.1)
    found.square().mean().backward()
    assert all(parameter.grad is not None for _, parameter in module.list_trained())


def test_what_adapters_have_learnt_is_the_same_when_they_are_merged(in_world: Path) -> None:
    model = load_small_model(in_world, "model.lora.rank=2")
    module = reinforce(model, make_reinforce(), 3)
    noisy, sigma = torch.randn(1, model.latent_channels, 6, 6), torch.tensor([0.5])
    model.save_pretrained("export")
    opened = UniImage.from_pretrained("export")
    with torch.no_grad():
        expected = module.predict_velocity(model.prompt(["a red circle"]), noisy, sigma)
        found = opened.predict_velocity(noisy, sigma, opened.encode_condition(opened.prompt(["a red circle"])))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class RejectFrom:
    """A spike rule that lets only the first steps pass."""

    def __init__(self, passing: int) -> None:
        self.passing, self.judged = passing, 0

    def judge(self, norm: float, loss: float) -> Verdict:
        self.judged += 1
        return Verdict(None if self.judged <= self.passing else "told so", 1.0)

    def reset(self) -> None:
        self.judged = 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return


def test_a_guard_that_goes_back_takes_the_old_policy_with_it(model: UniImage) -> None:
    callback = make_reinforce(rounds=Rounds(steps=1, decay=0.5, decay_growth=0.5))
    follow = Follow(callback)
    reinforce(model, callback, 5, Guard(RejectFrom(3), patience=2), follow)
    # Three steps, the fourth rejected, and with the fifth back to the start.
    assert not torch.equal(follow.old[3][0], follow.old[2][0])
    assert_equal(follow.old[4], follow.old[3])
    assert_equal(follow.old[5], follow.old[0])
    assert_equal(follow.trained[5], follow.trained[0])
    assert (callback.round, callback.round_steps) == (0, 0)


def test_a_model_learns_what_is_rewarded(model: UniImage) -> None:
    rewards: list[float] = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            rewards.append(float(trainer.callback_metrics["reinforce/reward"]))

    reinforce(model, make_reinforce(), 24, Note())
    assert sum(rewards[-6:]) / 6 > sum(rewards[:6]) / 6 + 5


# Waiting for a reward.


def down(path: str, good_for: int = 0) -> list[str]:
    """Overrides of a reward that fails while there is a file."""
    patience = "stage.reinforce.patience={first_seconds: 0.1, longest_seconds: 0.2, give_up_minutes: 0.005}"
    return [f"+reward.red.down={path}", f"+reward.red.good_for={good_for}", patience]


def test_a_pause_changes_nothing(whole_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    failing = [*down("nowhere", 3), "+reward.red.failures=2", "stage.reinforce.patience.give_up_minutes=5"]
    text = run_to_success("train", capfd, *REINFORCE, *ROUND, *failing, "hydra.run.dir=paused")
    assert "training pauses for 0.1 s: reward.red fails (nobody is there)" in text
    assert "training pauses for 0.2 s" in text
    assert_runs_equal(whole_run, Path("paused"))


def test_a_run_that_waited_for_too_long_ends_with_all_that_it_did(
    whole_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("down").touch()
    # The reward fails in the second batch of the fifth step: the first one comes again.
    text = run_to_message("train", capfd, *REINFORCE, *ROUND, *down("down", 9), "hydra.run.dir=ended")
    assert "the stage has waited for" in text
    assert "give_up_minutes=0.005" in text
    assert (Path("ended") / "checkpoints" / "reinforce-step=4.ckpt").is_file()
    Path("down").unlink()
    run_to_success("train", capfd, *REINFORCE, *ROUND, *down("down", 9), "hydra.run.dir=ended")
    assert_runs_equal(whole_run, Path("ended"))


def test_scores_that_are_none_are_an_error_by_name(model: UniImage) -> None:
    class Broken(Redness):
        def score(self, prompts: Any, pictures: Any) -> list[float]:
            return [float("inf") for _ in pictures]

    with pytest.raises(ValueError, match=r"reward.red must give a finite score for each of 8 pictures"):
        reinforce(model, make_reinforce(Broken()), 1)


# Prompts.


def test_prompts_follow_from_the_place_alone_and_come_equally_often() -> None:
    prompts = [PicturePrompt(str(number)) for number in range(7)]
    order = PromptOrder(prompts, 3)
    drawn = [order.find(place) for place in range(70)]
    backwards = [PromptOrder(prompts, 3).find(place) for place in reversed(range(70))]
    assert backwards[::-1] == drawn
    assert all(sorted(p.text for p in drawn[i : i + 7]) == list("0123456") for i in range(0, 70, 7))
    assert drawn[:7] != drawn[7:14]
    assert drawn != [PromptOrder(prompts, 4).find(place) for place in range(70)]


def collect(source: str, *texts: Sequence[str] | None) -> Any:
    rewards = [WeightedReward(f"r{i}", Redness(each)) for i, each in enumerate(texts)]
    found = collect_prompts(source, rewards)
    return found if found is None else [prompt.text for prompt in found]


def test_prompts_are_those_that_every_reward_can_score(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("b\n\na\nb\n")
    assert collect("rewards", ["a", "b", "a"], None) == ["a", "b"]
    assert collect("rewards", ["a", "b"], ["c", "b"]) == ["b"]
    assert collect("shards", None) is None
    assert collect(str(tmp_path / "p.txt"), ["a", "b", "c"], None) == ["b", "a"]


@pytest.mark.parametrize(
    ("source", "texts", "words"),
    [
        ("rewards", [None], "no reward has prompts of its own"),
        ("rewards", [["a"], ["b"]], "r0, r1 have no prompt in common"),
        ("shards", [["a"]], "stage.reinforce.prompts=shards: reward.r0 can score only prompts of its own"),
        ("p.txt", [["a"]], "reward.r0 can't score pictures of 'b'"),
        ("nowhere.txt", [["a"]], "stage.reinforce.prompts=nowhere.txt doesn't exist"),
    ],
)
def test_prompts_that_can_t_be_scored_are_named(source: str, texts: list, words: str) -> None:
    Path("p.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=words):
        collect(source, *texts)


def test_captions_of_the_shards_are_prompts_too(model: UniImage) -> None:
    seen: list[str] = []

    class Any_(Redness):  # noqa: N801
        def score(self, prompts: Any, pictures: Any) -> list[float]:
            seen.extend(prompt.text for prompt in prompts)
            return super().score(prompts, pictures)

    reinforce(model, make_reinforce(Any_(None), prompts="shards"), 2)
    batches = iter(make_data(model, "stage.batch_size=2", "stage.dropout.caption_drop_prob=0").train_dataloader())
    texts = [text for _ in range(2) for text in next(batches).texts]
    assert seen == [text for text in texts for _ in range(4)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounds": {"steps": 0}}, "stage.reinforce.rounds.steps must be at least 1"),
        ({"rounds": {"decay": 1}}, "stage.reinforce.rounds.decay must be at least 0 and below 1"),
        ({"rounds": {"decay_growth": -1}}, "stage.reinforce.rounds.decay_growth must be at least 0"),
        ({"rounds": {"step": 1}}, "stage.reinforce.rounds.step isn't an option; there are steps, decay"),
        ({"rounds": 3}, "stage.reinforce.rounds must be a mapping"),
        ({"drawing": {"group_size": 1}}, "stage.reinforce.drawing.group_size must be at least 2"),
        ({"drawing": {"num_inference_steps": 0}}, "num_inference_steps must be at least 1"),
        ({"drawing": {"scheduler": {"_class_name": "DDIMScheduler"}}}, "DDIMScheduler"),
        ({"patience": {"first_seconds": 0}}, "stage.reinforce.patience.first_seconds must be positive"),
        ({"supervised_weight": -1}, "stage.reinforce.supervised_weight must be at least 0"),
    ],
)
def test_options_that_can_t_be_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReinforceOptions(**options)


def test_a_reward_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"reward.x: object isn't a reward, it has no list_prompts, score"):
        WeightedReward("x", object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reward.x.weight must be positive, got 0"):
        WeightedReward("x", Redness(), 0)
    with pytest.raises(ValueError, match=r"stage.reinforce needs a reward"):
        Reinforce([], ReinforceOptions())

"""The benchmark: its baseline computes what ours does, its figures are what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.costs import Case, make_inputs
from experiments.reports import format_table
from experiments.speed.cached import IMAGES, LATENTS
from experiments.speed.kept_prompts import FILES, RUN, bench_prompt_cache
from experiments.speed.kernels import bench_kernels
from experiments.speed.loader import BUCKETS, PILLOW, PLAIN, REDUCED, measure, memory_of_loading
from experiments.speed.measure import Memory, in_child, interleaved, search_largest, summary
from experiments.speed.release import ReleaseWay
from experiments.speed.training import BASELINE, OURS, Side, check_equal, make_model, targets
from tbac.app import to_plain
from tbac.models import UniImage
from tbac.sampling.guidance import Guidance
from tbac.sampling.solver import solve
from tests.helpers.commands import run_to_message, run_to_success
from tests.helpers.configs import ROOT, compose_config
from tests.helpers.pictures import make_prompt_cases
from tests.helpers.small_bench import SMALL


@pytest.fixture
def config() -> dict:
    return to_plain(compose_config("bench", *SMALL))


@pytest.mark.parametrize("case", [Case("text", 20, 3), Case("image + text", 24, 2, 3)])
def test_the_baseline_computes_what_ours_does(config: dict, case: Case) -> None:
    model = make_model(config["model"], "cpu")
    torch.nn.init.normal_(model.ladder.queries, std=0.5)
    arguments = (make_inputs(model, case, 4), *targets(model, case.batch, 4))
    found = check_equal(Side(BASELINE, model, config), Side(OURS, model, config), arguments)
    assert found["loss"] < 1e-5
    assert max(found.values()) < 1e-4


def test_a_difference_is_noticed(config: dict) -> None:
    model, case = make_model(config["model"], "cpu"), Case("text", 20, 3)
    arguments = (make_inputs(model, case, 4), *targets(model, case.batch, 4))
    release, ours = Side(BASELINE, model, config), Side(OURS, model, config)
    model.ladder.queries.data[0] += 0.5
    with pytest.raises(RuntimeError, match="the release's way and ours differ"):
        check_equal(release, ours, arguments)


@pytest.mark.parametrize("as_shipped", [False, True])
def test_the_baseline_does_not_train_back_through_the_vision_tower(config: dict, as_shipped: bool) -> None:
    """With gradient checkpointing, a tower that carried a gradient would run again in the backward pass."""
    model, case = make_model(config["model"], "cpu"), Case("image + text", 24, 2, 3)
    inputs = make_inputs(model, case, 4)
    release = ReleaseWay(model, as_shipped)
    runs: list[bool] = []
    release.mllm.model.visual.blocks[0].mlp.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    release.loss(dict(inputs), *targets(model, case.batch, 4)).backward()
    assert runs == [False]
    features = release.encode_images(inputs["pixel_values"], inputs["image_grid_thw"])
    expected = model.mllm.encode_images(inputs["pixel_values"], inputs["image_grid_thw"])
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["text", "one_image"])
def test_the_baseline_reads_real_prompts_as_ours_does(model: UniImage, name: str) -> None:
    texts, images = make_prompt_cases()[name]
    release = ReleaseWay(model)
    for text, group in zip(texts, images or [None] * len(texts), strict=True):  # prompts of one length: one by one
        inputs = model.prompt([text], [group])
        torch.testing.assert_close(
            release.encode_condition(dict(inputs)), model.encode_condition(inputs).states, rtol=1e-4, atol=1e-5
        )


def test_only_the_query_rows_of_the_baseline_s_table_get_gradients(config: dict) -> None:
    model, case = make_model(config["model"], "cpu"), Case("text", 20, 2)
    side = Side(BASELINE, model, config)
    side.loss(make_inputs(model, case, 4), *targets(model, 2, 4)).backward()
    gradient = side.release.mllm.get_input_embeddings().weight.grad
    assert gradient[: side.release.vocabulary].abs().max() == 0
    assert gradient[side.release.vocabulary :].abs().max() > 0


def test_the_baseline_s_samples_are_ours(config: dict) -> None:
    model = make_model(config["model"], "cpu")
    inputs = make_inputs(model, Case("text", 12, 3), 4)
    noise, rows = targets(model, 2, 4)[0], torch.tensor([0, 0, 1, 2])
    release = ReleaseWay(model).eval()
    release.mllm.gradient_checkpointing_disable()
    theirs = release.sample({k: inputs[k][rows] for k in ("input_ids", "attention_mask")}, noise, 4, Guidance(3.0))
    with torch.no_grad():
        condition = model.denoiser.project(model.encode_condition(inputs))[rows]
    torch.testing.assert_close(solve(model, condition, Guidance(3.0), noise, 4), theirs, rtol=1e-4, atol=1e-4)


def test_kept_prompts_are_compared_with_prompts_that_run(config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that gave another prompt's keys would be noticed before anything is measured."""
    from tbac.models.kept_prompts import KeptPrompts

    make_key = KeptPrompts.make_key
    monkeypatch.setattr(KeptPrompts, "make_key", lambda self, text, images: make_key(self, text[:1] and "0", images))
    with pytest.raises(RuntimeError, match="the losses of kept prompts aren't"):
        next(bench_prompt_cache(config, torch.device("cpu")))


@pytest.mark.slow
def test_a_run_writes_its_tables_and_its_report(capfd: pytest.CaptureFixture[str]) -> None:
    text = run_to_success("bench", capfd, *SMALL, "tokens={text: [12], image: [12]}", "out=bench")
    report = json.loads(Path("bench/report.json").read_text())
    for case in ("text, 12", "image + text, 12"):
        found = report["training"]["cases"][case]
        assert found["ratio"] == pytest.approx(found["median_s"][BASELINE] / found["median_s"][OURS], rel=0.2)
        shipped = {"release, as shipped"} if "image" in case else set()
        assert set(found["memory"]) == {"release", "ours", "ours, checkpointed"} | shipped
    assert report["sampling"]["cases"]["text, 2, 4 x 4"]["difference"]["release"] < 1e-3
    for case in ("text", "image + text"):
        found = report["cached"]["cases"][case]
        assert found["losses"][IMAGES] == pytest.approx(found["losses"][LATENTS], rel=1e-5)
        assert found["ratio"] == pytest.approx(found["median_s"][IMAGES] / found["median_s"][LATENTS], rel=0.2)
        assert set(found["memory"]) == {IMAGES, LATENTS}
        assert 0 < found["encoder_share"] < 1
    for case, sides in (("text, 20", 3), ("image + text, 20", 4)):
        found = report["prompt_cache"]["cases"][case]
        assert found["difference"] < 1e-5
        assert len(found["median_s"]) == sides
        assert set(found["memory"]) == {RUN, FILES}
        assert found["ratio"] == pytest.approx(found["median_s"][RUN] / found["median_s"][FILES], rel=0.2)
    found = report["loader"]
    for side, seconds in found["median_s"].items():
        assert found["samples_per_s"][side] == pytest.approx(12 / seconds, rel=0.01)
    assert 0 < found["choosing_share"][OURS] < found["choosing_share"][BUCKETS] * 5
    assert found["memory"]["samples"] == list(range(50, 501, 50))
    assert Path("bench/report.md").read_text().strip() in text
    assert "| release | ours | ours, checkpointed | release, as shipped |" in text


def test_isolated_sides_take_turns_in_processes_of_their_own(capfd: pytest.CaptureFixture[str]) -> None:
    options = [*SMALL, "parts=[training]", "tokens={text: [8], image: [8]}", "isolate=true", "turns=1"]
    options.append("sides=[release,ours]")
    text = run_to_success("bench", capfd, *options, "precision=bf16-mixed", "model.dtype=bfloat16", "out=bench")
    assert "medians of 1 steps in each of 1 turns" in text
    assert set(json.loads(Path("bench/report.json").read_text())["training"]["cases"]) == {"text, 8"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["parts=[training,speed]"], "loader, batches, kernels, step; got 'speed'"),
        (["precision=fp8"], "precision must be one of 32-true"),
        (["tokens={text: [16], image: []}"], "every entry of tokens must exceed shared_tokens=32"),
        (["repeats=0"], "repeats must be at least 1, got 0"),
        (["loader.memory_samples=499"], "loader.memory_samples must be at least 500, got 499"),
        (["sides=[ours]"], "sides must begin with release, ours"),
        (["parts=[step,training]", "precision=bf16-true"], "so it comes alone"),
    ],
)
def test_what_can_t_be_measured_is_refused(capfd: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    assert words in run_to_message("bench", capfd, *options)


def test_one_step_prints_its_peak_memory(capfd: pytest.CaptureFixture[str]) -> None:
    options = [
        *SMALL,
        "parts=[step]",
        "precision=bf16-true",
        "optim=adamw8bit",
        "tokens={text: [12], image: [12]}",
        "model.dtype=bfloat16",
    ]
    assert "| peak gib |" in run_to_success("bench", capfd, *options, "out=bench")
    found = json.loads(Path("bench/report.json").read_text())["step"]
    assert 0.1 < found["peak_gib"] < 4
    assert found["gradient_norm"] > 0


@pytest.mark.slow
def test_the_real_sizes_take_a_step_within_24_gb() -> None:
    """In a process of its own, as its user runs it."""
    command = [sys.executable, str(ROOT / "experiments/bench.py"), "experiment=real_size_cpu", "out=bench"]
    subprocess.run(command, check=True)
    found = json.loads(Path("bench/report.json").read_text())["step"]
    assert found["parameters"] > 5e9
    assert found["peak_gib"] * 1024**3 < 24e9


@pytest.mark.slow
def test_memory_of_loading_is_flat_over_many_samples() -> None:
    found = in_child(memory_of_loading, 100_000, 2)
    assert found["samples"][-1] == 100_000
    assert max(found["mib"][2:]) < 1.03 * found["mib"][1]


@pytest.mark.slow
def test_loading_costs_little_more_than_decoding() -> None:
    found = measure({"loader": to_plain(compose_config("bench").loader)})
    rates = found["samples_per_s"]
    assert rates[OURS] > 1.3 * rates[PILLOW]
    assert rates[REDUCED] > 0.7 * rates[PLAIN]
    assert max(found["choosing_share"].values()) < 0.05


@pytest.mark.skipif(torch.cuda.is_available(), reason="this computer has a GPU")
def test_the_gpu_preset_says_that_there_is_no_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    assert "device=cuda: torch finds 0 GPUs here; device=cpu needs none" in run_to_message(
        "bench", capfd, "experiment=bench_gpu"
    )


def test_the_gpu_preset_has_the_real_sizes() -> None:
    config = compose_config("bench", "experiment=bench_gpu")
    assert (config.model.num_queries, config.batch.text, config.batch.image, config.precision) == (
        64,
        16,
        4,
        "bf16-mixed",
    )
    assert config.model.architecture.mllm.text_config.hidden_size == 2048


def test_sides_take_turns() -> None:
    order: list[str] = []
    seconds = interleaved({n: (lambda n=n: order.append(n)) for n in ("a", "b")}, 3, torch.device("cpu"))
    assert order == ["a", "b"] * 4
    assert [len(v) for v in seconds.values()] == [3, 3]
    found = summary({"a": [3.0, 4.0, 100.0], "b": [2.0, 2.0, 1.0]}, "a", "b")
    assert (found["median_s"], found["ratio"]) == ({"a": 4.0, "b": 2.0}, 2.0)


def _hold(mib: int, extra: int) -> dict[str, float]:
    memory = Memory(torch.device("cpu"))
    held = torch.ones(mib * 2**18)  # float32: 4 bytes
    memory.begin()
    assert (held.sum() + torch.ones(extra * 2**18).sum()) > 0
    return memory.end()


def test_memory_is_that_of_the_work_alone() -> None:
    found = in_child(_hold, 200, 300)
    assert found["standing_mib"] == pytest.approx(200, abs=40)
    assert found["peak_mib"] == pytest.approx(500, abs=80)


def _fail() -> None:
    raise ValueError("of its own")


def test_a_child_s_failure_is_told() -> None:
    with pytest.raises(RuntimeError, match="ValueError: of its own"):
        in_child(_fail)
    with pytest.raises(RuntimeError, match="it ended without a result"):
        in_child(os._exit, 3)


@pytest.mark.parametrize("most", [0, 1, 2, 5, 8, 63, 64, 100])
def test_the_largest_batch_is_found(most: int) -> None:
    assert search_largest(lambda batch: batch <= most, 64) == min(most, 64)


def test_tables_are_markdown() -> None:
    assert format_table(["a", "b"], [["x", 1]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_kernels_of_each_step_are_counted_by_family(config: dict) -> None:
    given = list(bench_kernels({**config, "sides": ["release", "ours"]}, torch.device("cpu")))
    assert [one["table"].count("all; without a profiler") for one in given] == [1, 2, 2]
    assert len(given[-1]["steps"]) == 2
    for label, step in given[-1]["steps"].items():
        assert step["busy_ms"] == pytest.approx(sum(step["families_ms"].values()), abs=0.1)
        assert step["kernels"] == sum(step["counts"].values())
        assert step["families_ms"]["matrix products"] > 0
        assert label in given[-1]["line"]

"""What users type wrong ends in one message that names it, before a weight is read; what is meant is accepted."""

from pathlib import Path

import pytest

from tests.helpers.commands import run_to_message
from tests.helpers.weights import refuse_weights

SHAPES = ["world=shapes", "debug=few_steps"]
EVALUATE = ["checkpoint=nowhere"]


@pytest.fixture(autouse=True)
def _no_weights(in_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_weights(monkeypatch)


# Command, arguments, and words of the message.
TRAIN = [
    ("stage.lr=fast", "stage.lr must be a number, positive, got 'fast'"),
    ("stage.lr=0", "stage.lr must be positive, got 0"),
    ("stage.lr=nan", "stage.lr must be"),
    ("stage.lr=null", "stage.lr must be"),
    ("stage.lr=true", "stage.lr must be"),
    ("stage.lr=[1e-3]", "stage.lr must be"),
    ("stage.min_lr=low", "stage.min_lr must be"),
    ("stage.min_lr=1", "stage.min_lr=1"),
    ("stage.batch_size=1.5", "stage.batch_size must be a whole number of at least 1, got 1.5"),
    ("stage.batch_size=many", "stage.batch_size must be"),
    ("stage.steps=ten", "stage.steps must be"),
    ("stage.steps=2.5", "stage.steps must be"),
    ("stage.samples=0", "stage.samples must be at least 1, got 0"),
    ("stage.warmup_steps=-1", "stage.warmup_steps must be at least 0, got -1"),
    ("stage.warmup_steps=x", "stage.warmup_steps must be"),
    ("stage.clip=x", "stage.clip must be"),
    ("stage.clip=0", "stage.clip must be positive, got 0"),
    ("stage.trainable=vae", "stage.trainable must be some of ['queries', 'connector', 'denoiser'], got 'vae'"),
    ("stage.trainable=[]", "stage.trainable must be"),
    ("stage.trainable=[queries,queries]", "stage.trainable must be"),
    ("stage.trainable=null", "stage.trainable must be"),
    ("stage.weight_decay=none", "stage.weight_decay must be"),
    ("stage.weight_decay=-0.1", "stage.weight_decay must be at least 0, got -0.1"),
    ("stage.shuffle_buffer=0", "stage.shuffle_buffer must be at least 1, got 0"),
    ("stage.image_size=small", "stage.image_size must be"),
    ("stage.min_delta=inf", "stage.min_delta must be"),
    ("stage.ema_decay=1", "stage.ema_decay must be"),
    ("stage.ema_decay=x", "stage.ema_decay must be"),
    ("stage.accumulate=0", "stage.accumulate must be at least 1, got 0"),
    ("stage.noise_samples_per_prompt=1.5", "stage.noise_samples_per_prompt must be"),
    ("stage.keep_optimizer=maybe", "stage.keep_optimizer must be true or false, got 'maybe'"),
    ("stage.val_every=0", "stage.val_every must be at least 1, got 0"),
    ("stage.val_samples=x", "stage.val_samples must be"),
    ("stage.name=../../x", "stage.name must be a name"),
    ("stage.name=null", "stage.name must be a name"),
    ("stage.name=5", "stage.name must be a name"),
    ("stage.sources=[]", "stage.sources must be a list of at least 1"),
    ("stage.sources=null", "stage.sources must be"),
    ("stage.sources={}", "stage.sources"),
    ("stage.sources=[{split: train}]", "it lacks path"),
    ("stage.sources=[{path: x, weight: -1}]", "weight must be a number, positive, got -1"),
    ("stage.sources=[{path: x, foo: 1}]", "unknown key 'foo'"),
    ("stage.sources=nowhere", "nowhere"),
    ("stage.sample_prompts=[1]", "stage.sample_prompts must be"),
    ("stage.dropout=0.1", "stage.dropout must be a mapping"),
    ("stage.dropout=null", "stage.dropout must be a mapping"),
    ("stage.dropout.caption_drop_prob=often", "stage.dropout.caption_drop_prob must be"),
    ("stage=null", "stage is needed"),
    ("seed=-1", "seed must be"),
    ("seed=99999999999999999999", "seed must be"),
    ("seed=1.5", "seed must be"),
    ("stages=[]", "stages must be"),
    ("stages=[t2i_pretrain,t2i_pretrain]", "stages must be"),
    ("stages=t2i", "t2i"),
    ("+stage_overrides.finetun=[stage.lr=1]", "stage_overrides.finetun"),
    ("stage_overrides=5", "stage_overrides must be"),
    ("+foo=1", "foo isn't an option"),
    ("+stage.foo=1", "stage.foo isn't an option"),
    ("+callbacks.ema.foo=1", "callbacks.ema.foo isn't an option"),
    ("+machine.foo=1", "machine.foo isn't an option"),
    ("foo=1", "foo isn't an option"),
    ("stage.lrr=1", "stage.lrr isn't an option"),
    ("taps=null", "taps is needed"),
    ("taps=5", "taps/5"),
    ("taps.layers=5", "taps.layers"),
    ("ladder.query_std=nan", "query_std"),
    ("ladder.query_std=inf", "query_std"),
    ("ladder=null", "ladder is needed"),
    ("model=null", "model is needed"),
    ("model.num_queries=1e30", "num_queries"),
    ("model.seed=-1", "model.seed"),
    ("model.dtype=5", "model.dtype"),
    ("+model.foo=1", "foo"),
    ("optim=null", "optim is needed"),
    ("optim.betas=0.9", "optim.betas must be"),
    ("optim.betas=[0.9,1.5]", "optim.betas must be"),
    ("optim.eps=0", "optim.eps must be"),
    ("optim=sgd", "'optim/sgd'"),
    ("flow.shift=0", "flow.shift must be positive, got 0"),
    ("flow.scheme=null", "flow.scheme must be"),
    ("guard.window=none", "guard.window must be"),
    ("guard=null", "guard is needed"),
    ("callbacks.ema=null", "~callbacks.ema"),
    ("+callbacks.x=5", "callbacks.x must be a mapping"),
    ("+callbacks.x={every: 1}", "callbacks.x._target_"),
    ("callbacks.checkpoint.keep=0", "callbacks.checkpoint.keep must be at least 1, got 0"),
    ("callbacks.checkpoint.every=never", "callbacks.checkpoint.every must be"),
    ("callbacks.preemption.stop=[TERM]", "callbacks.preemption.stop must be"),
    ("callbacks.guard.then=stop", "callbacks.guard.then must be"),
    ("data.max_bad_share=2", "data.max_bad_share must be"),
    ("data.buckets=wide", "data.buckets must be"),
    ("data.num_workers=-1", "data.num_workers must be"),
    ("data.prefetch_factor=0", "data.prefetch_factor must be at least 1, got 0"),
    ("data=null", "data is needed"),
    ("machine.devices=0", "machine.devices must be"),
    ("machine.devices=two", "machine.devices must be"),
    ("machine.accelerator=gpus", "machine.accelerator must be"),
    ("machine.precision=half", "machine.precision must be"),
    ("machine.strategy=horovod", "machine.strategy must be"),
    ("machine.timeout_minutes=0", "machine.timeout_minutes must be positive, got 0"),
    ("machine.num_workers=x", "machine.num_workers must be"),
    ("machine=cuda", "machine.accelerator=cuda: torch finds no GPU here"),
    ("trainer.log_every_n_steps=x", "trainer.log_every_n_steps must be"),
    ("+trainer.foo=1", "trainer.foo isn't an option"),
    ("init=5", "5"),
    ("init=[a]", "[a]"),
    ("init=~nobody_of_this_name/x", "there is no such user"),
    ("resume=nowhere", "nowhere"),
    ("stage.lr=${nothing}", "stage.lr: Interpolation key 'nothing' not found"),
    ("stage.lr=1e-3,2e-3", "stage.lr"),
    ("stage.lr=[1e-3", "stage.lr"),
]
REINFORCE = [
    ("stage.reinforce.drawing.group_size=1", "stage.reinforce.drawing.group_size must be at least 2, got 1"),
    ("stage.reinforce.drawing.steps=4", "stage.reinforce.drawing.steps isn't an option"),
    ("stage.reinforce.drawing.scheduler={_class_name: DDIMScheduler}", "DDIMScheduler"),
    ("stage.reinforce.loss.beta=0", "stage.reinforce.loss.beta must be positive, got 0"),
    ("stage.reinforce.loss.weigh_errors=3", "stage.reinforce.loss.weigh_errors must be true or false"),
    ("stage.reinforce.rounds.decay=1", "stage.reinforce.rounds.decay must be at least 0 and below 1, got 1"),
    ("stage.reinforce.patience.give_up_minutes=0", "stage.reinforce.patience.give_up_minutes must be positive"),
    ("stage.reinforce.prompts=nowhere.txt", "stage.reinforce.prompts=nowhere.txt doesn't exist"),
    ("stage.reinforce.prompts=shards", "stage.reinforce.prompts=shards: reward.geneval can score only prompts of its"),
    ("reward=nothing", "stage.reinforce needs a reward, and there is none of that name: reward=NAME may be endpoint,"),
    ("reward=null", "reward is needed"),
    ("reward.geneval.weight=0", "reward.geneval.weight must be positive, got 0"),
    ("reward.geneval.benchmark.file=nowhere.jsonl", "nowhere.jsonl"),
    ("reward.geneval.judge.path=nowhere.json", "nowhere.json"),
    ("+reward.geneval.judgement=3", "reward.geneval.judgement isn't an option; did you mean judge?"),
    ("reward=endpoint", "OPENAI_BASE_URL"),
    ("+reward.mine={weight: 1}", "reward.mine._target_ must name a class"),
]
OTHERS = [
    ("generate", ["checkpoint=x", "prompts=[a]", "device=gpu"], "device must be auto, cpu, cuda"),
    ("generate", ["checkpoint=x", "prompts=[a]", "device=cuda"], "device=cuda: torch finds 0 GPUs"),
    ("generate", ["checkpoint=x", "prompts=[a]", "negative_prompt=null"], "negative_prompt must be a text"),
    ("generate", ["checkpoint=x", "prompts=null"], "prompts must be a list"),
    ("generate", ["checkpoint=x", "prompts=['']"], "prompts must be a list"),
    ("generate", ["checkpoint=x", "prompts=[a]", "images=x.png"], "x.png"),
    ("generate", ["checkpoint=x", "prompts=[a]", "out=file"], "it is a file"),
    ("generate", ["checkpoint=x", "prompts=[a]", "out=file/below"], "file is a file"),
    ("generate", ["checkpoint=x", "prompts=[a]", "num_inference_steps=0"], "num_inference_steps must be at least 1"),
    ("generate", ["checkpoint=x", "prompts=[a]", "guidance_scale=high"], "guidance_scale must be"),
    ("generate", ["checkpoint=x", "prompts=[a]", "guidance_interval=0.5"], "guidance_interval must be"),
    ("generate", ["checkpoint=x", "prompts=[a]", "guidance_interval=[0.1,2]"], "guidance_interval must be"),
    ("generate", ["checkpoint=x", "prompts=[a]", "seed=-1"], "seed must be"),
    ("generate", ["checkpoint=x", "prompts=[a]", "height=tall"], "height must be"),
    ("generate", ["checkpoint=x", "prompts=[a]", "batch_size=0"], "batch_size must be at least 1, got 0"),
    ("generate", ["checkpoint=x", "prompts=[a]", "compile=5"], "compile must be true or false"),
    ("generate", ["checkpoint=x", "prompts=[a]", "dtype=half"], "dtype must be"),
    ("generate", ["checkpoint=x", "prompts=[a]", "connector=5"], "connector must be"),
    ("generate", ["checkpoint=x", "prompts=[a]", "+foo=1"], "foo isn't an option"),
    ("generate", ["prompts=[a]"], "checkpoint is needed"),
    ("generate", ["checkpoint=null", "prompts=[a]"], "checkpoint must be a path"),
    ("answer", ["checkpoint=x"], "question is needed"),
    ("answer", ["checkpoint=x", "question=null"], "question must be a text"),
    ("answer", ["checkpoint=x", "question=a", "max_new_tokens=0"], "max_new_tokens must be at least 1"),
    ("answer", ["checkpoint=x", "question=a", "image=nowhere.png"], "nowhere.png"),
    ("evaluate", [*EVALUATE, "steps=draw"], "steps must be some of ['generate', 'score', 'report'], got 'draw'"),
    ("evaluate", [*EVALUATE, "steps=[]"], "steps must be"),
    ("evaluate", [*EVALUATE, "samples=0"], "samples must be at least 1, got 0"),
    ("evaluate", [*EVALUATE, "rank=2"], "rank=2"),
    ("evaluate", [*EVALUATE, "benchmark.name=../up"], "benchmark.name must be a name"),
    ("evaluate", [*EVALUATE, "benchmark=null"], "benchmark is needed"),
    ("evaluate", [*EVALUATE, "benchmark.seed=x"], "benchmark.seed must be"),
    ("evaluate", [*EVALUATE, "benchmark.foo=1"], "benchmark.foo isn't an option"),
    ("evaluate", [*EVALUATE, "judge=null"], "judge is needed"),
    ("evaluate", [*EVALUATE, "benchmark=folder"], "benchmark.file is needed"),
    ("evaluate", [*EVALUATE, "out=file"], "it is a file"),
    ("export", ["checkpoint=x", "out=file"], "it is a file"),
    ("export", ["checkpoint=x", "out=y", "standalone=yes please"], "standalone must be true or false"),
    ("export", ["checkpoint=x"], "out is needed"),
    ("import_official", ["checkpoint=x", "mllm=x", "denoiser=x", "out=y", "image_pixels=0"], "image_pixels must be"),
    ("plan", ["world=shapes", "utilisation=2"], "utilisation must be"),
    ("plan", ["world=shapes", "memory_gb=[]"], "memory_gb must be"),
    ("plan", ["world=shapes", "stages=[t2i]"], "t2i"),
    ("plan", ["world=shapes", "peak_tflops=fast"], "peak_tflops must be"),
    ("sweep", ["name=../x"], "name must be a name"),
    ("sweep", ["name=taps_x_lr", "suites=[faces]"], "suites=['faces'] must be some of"),
    ("sweep", ["name=taps_x_lr", "prompts_per_tag=0"], "prompts_per_tag must be at least 1"),
    ("demo", ["stages=[]"], "stages must be"),
    ("data_prep.convert", ["out=x"], "name the layout"),
    ("data_prep.convert", ["dataset=folder", "out=x"], "dataset.path is needed"),
    ("data_prep.convert", ["dataset=folder", "dataset.path=x", "out=file"], "it is a file"),
    ("data_prep.convert", ["dataset=folder", "dataset.path=x", "out=y", "processes=0"], "processes must be at least 1"),
    ("data_prep.verify", ["path=nowhere"], "nowhere"),
    ("data_prep.verify", ["path=.", "samples=3"], "samples must be true or false"),
    ("data_prep.cache_latents", ["path=.", "denoiser=x", "out=y", "dtype=half"], "dtype must be"),
    ("data_prep.cache_latents", ["path=.", "denoiser=x", "out=y", "device=gpu"], "device must be"),
    ("bench", ["repeats=0"], "repeats must be at least 1"),
]


@pytest.mark.parametrize(("argument", "words"), TRAIN, ids=[argument for argument, _ in TRAIN])
def test_training(argument: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert_one_message(run_to_message("train", capfd, *SHAPES, argument), words)


@pytest.mark.parametrize(("argument", "words"), REINFORCE, ids=[argument for argument, _ in REINFORCE])
def test_reinforcement(argument: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    stage = ["stage=reinforce", "stage.previous=null"]
    assert_one_message(run_to_message("train", capfd, *SHAPES, *stage, argument), words)


@pytest.mark.parametrize(("command", "arguments", "words"), OTHERS, ids=[f"{c} {a[-1]}" for c, a, _ in OTHERS])
def test_other_commands(command: str, arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    assert_one_message(run_to_message(command, capfd, *arguments), words)


def assert_one_message(text: str, words: str) -> None:
    """One line that begins with `error:` says it, and nothing of Hydra's own reports."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text
    assert words in errors[0]
    assert "HYDRA_FULL_ERROR" not in text
    assert "full_key" not in text

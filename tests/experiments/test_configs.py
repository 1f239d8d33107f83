"""Every shipped YAML composes, and what it describes can be built."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from tbac.evaluation.captions import list_concepts
from tbac.models.architecture import check_config
from tests.helpers.configs import REQUIRED, ROOT, compose_config

CONF = ROOT / "conf"
ROOTS = [
    f.relative_to(CONF).with_suffix("").as_posix() for f in sorted([*CONF.glob("*.yaml"), *CONF.glob("study/*.yaml")])
]
# groups with a test of their own below
BY_THEMSELVES = (
    "benchmark",
    "captions",
    "scoring",
    "judge",
    "dataset",
    "debug",
    "experiment",
    "opening",
    "reward",
    "study",
    "sweep",
    "world",
)
OPTIONS = sorted(
    (f.parent.name, f.stem) for f in CONF.glob("*/*.yaml") if f.parent.name not in (*BY_THEMSELVES, "local")
)
WORLDS = sorted(f.stem for f in (CONF / "world").glob("*.yaml"))
STAGES = sorted(f.stem for f in (CONF / "stage").glob("*.yaml"))
PRESETS = sorted(f.stem for f in (CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", ROOTS)
def test_every_application_composes(name: str) -> None:
    config = compose_config(name, *REQUIRED.get(name, []))
    assert not OmegaConf.missing_keys(config)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_its_parts_can_be_built(group: str, option: str, in_world: Path) -> None:
    layers = ["taps.layers=[1,2,3,4]"] if option == "explicit" else []
    config = compose_config("train", "run_dir=.", f"{group}={option}", *layers)
    OmegaConf.to_container(config, resolve=True)
    part = config[group]
    if group == "model":
        check_config(instantiate(part, random_init=True))
    elif group == "callbacks":
        assert len([instantiate(c) for c in part.values()]) == len(part)
    elif "_target_" in part and group not in ("data", "trainer"):
        assert instantiate(part) is not None


def test_data_and_trainer_of_the_default_run_can_be_built(in_world: Path) -> None:
    config = compose_config("train", "run_dir=.")
    assert instantiate(config.data).batch_size == config.stage.batch_size
    assert instantiate(config.trainer, logger=False, callbacks=[]).max_steps == -1


@pytest.mark.parametrize("name", sorted(f.stem for f in (CONF / "optim" / "schedule").glob("*.yaml")))
def test_every_schedule_can_be_built(name: str) -> None:
    config = compose_config("train", "run_dir=.", f"optim/schedule@schedule={name}")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.stage.lr)
    assert instantiate(config.schedule)(optimizer, total_steps=config.stage.steps).get_last_lr()


def launcher_of(name: str, *overrides: str) -> Any:
    """The config of what starts the jobs of a sweep."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides), return_hydra_config=True).hydra.launcher


@pytest.mark.parametrize("name", sorted(f.stem for f in (CONF / "scoring").glob("*.yaml")))
def test_every_scoring_composes_with_suites_that_there_are(name: str) -> None:
    config = compose_config("sweep", "name=x", f"scoring={name}")
    for suite in config.suites:
        assert compose_config("evaluate", f"benchmark={suite}", "checkpoint=x", "out=x", *config.suite_overrides)


@pytest.mark.parametrize("name", sorted(f.stem for f in (CONF / "experiment" / "ladder").glob("*.yaml")))
def test_every_arm_of_the_ladder_s_study_fits_its_world(name: str) -> None:
    text = (CONF / "experiment" / "ladder" / f"{name}.yaml").read_text()
    assert f"python experiments/train.py world=words experiment=ladder/{name} " in text
    config = compose_config("train", "run_dir=.", "world=words", f"experiment=ladder/{name}")
    plan = check_config(instantiate(config.model, random_init=True))[1]
    assert plan.num_blocks == 10
    assert f"ladder/{name}" in (CONF / "sweep" / "ladder.yaml").read_text()


@pytest.mark.parametrize("name", sorted(f.stem for f in (CONF / "captions").glob("*.yaml")))
def test_all_captions_can_be_probed(name: str, tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text("caption,split,color\na red one,train,red\na blue one,train,blue\none in red,seen,red\n")
    part = compose_config("probe", f"captions={name}").captions
    path = {"path": str(table)} if OmegaConf.is_missing(part, "path") else {}
    assert list_concepts(instantiate(part, **path))


def test_a_cluster_chooses_the_launcher_that_reads_it() -> None:
    launcher = instantiate(launcher_of("train", "machine=slurm"), submitit_folder="x")
    assert launcher.params["nodes"] == 8
    assert launcher.params["additional_parameters"]["signal"] == "USR1@180"
    assert "BasicLauncher" in launcher_of("plan", "machine=slurm")._target_


@pytest.mark.parametrize("name", ROOTS)
def test_the_first_comment_of_a_command_s_config_is_the_command(name: str) -> None:
    text = (CONF / f"{name}.yaml").read_text()
    script = re.search(r"^# python (\S+\.py)\b", text, re.MULTILINE)
    assert script, text
    assert f'@command("{name}")' in (ROOT / script[1]).read_text()


def test_the_readme_knows_every_group() -> None:
    table = (CONF / "README.md").read_text().split("## Worlds")[0]
    groups = {f.name for f in CONF.iterdir() if f.is_dir()} - {"study", "hydra", "local"}
    assert groups <= set(re.findall(r"`(\w+)`", table))


def test_no_yaml_is_left_out() -> None:
    """Whoever adds a folder of configs adds a test of them."""
    folders = {f.parent.relative_to(CONF).as_posix() for f in CONF.rglob("*.yaml")} - {"local"}
    by_world = {f"world/{name}" for name in WORLDS}
    inherited = {"benchmark/base", "model/base", "ladder/base", "taps/base", "sweep/base", "experiment/ladder"}
    of_hydra = {"hydra/launcher", "hydra/callbacks"}
    assert folders == {".", *dict(OPTIONS), *BY_THEMSELVES, *inherited, "optim/schedule", *of_hydra, *by_world}
    for folder in by_world:
        assert sorted(f.stem for f in (CONF / folder).glob("*.yaml")) == STAGES


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", WORLDS)
def test_every_world_has_a_model_and_sources_for_every_stage(world: str, stage: str) -> None:
    config = compose_config("train", "run_dir=.", f"world={world}", f"stage={stage}")
    assert not OmegaConf.missing_keys(config)
    assert config.stage.name == stage
    assert config.stage.sources
    check_config(instantiate(config.model, random_init=True))


def test_a_model_that_is_named_wins_over_the_world_s() -> None:
    config = compose_config("train", "run_dir=.", "world=real", "model=qwen2_5_vl_7b_sana_1600m")
    assert config.model.mllm == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert config.stage.image_size == 512


def test_debug_presets_win_over_the_stage(in_world: Path) -> None:
    config = compose_config("train", "run_dir=.", "debug=few_steps", "stage=finetune")
    assert (config.stage.name, config.stage.steps, config.stage.warmup_steps) == ("finetune", 4, 0)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_names_its_command_and_composes_with_it(name: str) -> None:
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    script = re.search(rf"^# python experiments/(\S+)\.py experiment={name}\b", text, re.MULTILINE)
    assert script, "the first comment is the preset's command"
    root = script[1].removesuffix("/run").rsplit("/", 1)[-1]
    config = compose_config(root, *REQUIRED.get(root, []), f"experiment={name}")
    OmegaConf.to_container(config, resolve=True)
    if root == "demo":
        config = compose_config("train", "run_dir=.", "world=shapes", *config.train_overrides)
    check_config(instantiate(config.model, random_init=True))


@pytest.mark.parametrize("name", sorted(f.stem for f in (CONF / "sweep").glob("*.yaml")))
def test_every_sweep_composes_and_seeds_the_ladder_too(name: str) -> None:
    config = compose_config("train", "run_dir=.", f"sweep={name}", "seed=7")
    assert config.model.seed == 7
    assert instantiate(config.optim) is not None


@pytest.mark.parametrize("name", sorted(f.stem for f in (CONF / "benchmark").glob("*.yaml")))
def test_every_benchmark_composes(name: str, in_world: Path) -> None:
    config = compose_config("evaluate", "checkpoint=x", f"benchmark={name}")
    if not OmegaConf.is_missing(config.benchmark, "file"):
        assert Path(config.benchmark.file).exists()
        assert instantiate(config.benchmark).name == name
    else:
        inspect.signature(get_object(config.benchmark._target_)).bind(**{k: 0 for k in config.benchmark if k[0] != "_"})
    assert config.benchmark.name == name
    assert instantiate(config.judge) is not None


@pytest.mark.parametrize("name", sorted(f.stem for f in (CONF / "judge").glob("*.yaml")))
def test_every_judge_takes_its_options(name: str) -> None:
    """The options are those of the class; its weights, or its endpoint, aren't here."""
    judge = compose_config("evaluate", "checkpoint=x", "out=x", f"judge={name}").judge
    inspect.signature(get_object(judge._target_)).bind(**{k: v for k, v in judge.items() if k != "_target_"})


@pytest.mark.parametrize("name", sorted(f.stem for f in (CONF / "reward").glob("*.yaml")))
def test_every_reward_takes_its_options(name: str) -> None:
    """The options are those of the classes; weights, endpoints and files aren't all here."""
    rewards = compose_config("train", "run_dir=.", "stage=reinforce", f"reward={name}").reward
    parts = list(rewards.values())
    assert parts
    for part in parts:
        inner = [part[key] for key in ("benchmark", "judge", "reward") if key in part]
        parts += inner
        options = {key: value for key, value in part.items() if key not in ("_target_", "weight")}
        inspect.signature(get_object(part._target_)).bind(**options)


@pytest.mark.parametrize("world", WORLDS)
def test_reinforcement_has_a_reward_in_every_world_and_other_stages_have_none(world: str) -> None:
    config = compose_config("train", "run_dir=.", f"world={world}", "stage=reinforce")
    assert config.reward
    assert config.stage.reinforce
    other = compose_config("train", "run_dir=.", f"world={world}", "stage=finetune")
    assert "reward" not in other
    assert other.stage.reinforce is None


@pytest.mark.parametrize("name", sorted(f.stem for f in (CONF / "dataset").glob("*.yaml")))
def test_every_dataset_takes_its_options(name: str) -> None:
    dataset = compose_config("convert", f"dataset={name}", "dataset.path=x", "out=x").dataset
    inspect.signature(get_object(dataset._target_)).bind(**{k: v for k, v in dataset.items() if k != "_target_"})


def test_the_released_recipe_is_the_default_of_the_real_model() -> None:
    config = compose_config("train", "run_dir=.", "world=real")
    stage = config.stage
    assert (stage.steps, stage.batch_size, stage.lr, stage.min_lr) == (150000, 16, 1e-4, 1e-5)
    assert (stage.warmup_steps, stage.weight_decay, stage.clip) == (5000, 0.05, 0.5)
    assert (config.model.num_queries, config.model.image_pixels) == (64, 200704)
    dropout = compose_config("train", "run_dir=.", "world=real", "stage=ti2i_pretrain").stage.dropout
    assert [dropout[f"{k}_drop_prob"] for k in ("caption", "image", "both")] == [0.1, 0.1, 0.1]


def test_no_yaml_names_a_path_of_one_machine() -> None:
    machine_paths = [f"/{top}/" for top in ("home", "root", "mnt")]
    for file in CONF.rglob("*.yaml"):
        yaml.safe_load(file.read_text())
        assert not any(path in file.read_text() for path in machine_paths), file

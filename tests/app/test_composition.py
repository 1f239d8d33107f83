"""What the tests compose from memory is what Hydra composes from the files."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf, open_dict

from tests.helpers.configs import REQUIRED, ROOT

CHOICES = [(name, [*needed, *more]) for name, needed in REQUIRED.items() for more in ([], ["hydra.run.dir=y"])]
CHOICES += [
    ("train", ["run_dir=.", "world=shapes", "stage=finetune", "stage.lr=0.5", "~callbacks.progress"]),
    ("train", ["run_dir=.", "world=shapes", "stage=finetune", "stage.lr=0.25", "taps=final", "callbacks=audit"]),
    ("train", ["run_dir=.", "experiment=prompt_context", "guard=running_mean", "guard.decay=0.5"]),
    ("evaluate", ["checkpoint=x", "out=x", "benchmark=dpg", "judge=endpoint", "hydra.run.dir=y"]),
    ("sweep", ["name=x", "suites=[edits,dpg]"]),
]


def compose_all(name: str, overrides: list[str]) -> Any:
    """Compose a config with the part that belongs to Hydra; its values aren't resolved."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, overrides, return_hydra_config=True)


def to_plain(config: Any) -> Any:
    return OmegaConf.to_container(config, resolve=False)


@pytest.mark.parametrize(("name", "overrides"), CHOICES)
def test_a_config_from_memory_is_the_one_from_the_files(
    name: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered: Any = (config_loader_impl.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list)
    first = compose_all(name, overrides)
    kept = to_plain(first)
    with open_dict(first):  # what one test does to its config is unseen by the next
        first.added = 1
        first.hydra.overrides.task.append("x")
    again = compose_all(name, overrides)
    with monkeypatch.context() as patch:
        patch.setattr(config_loader_impl, "create_defaults_list", remembered[0].__wrapped__)
        patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", remembered[1].__wrapped__)
        plain = compose_all(name, overrides)
    assert to_plain(again) == kept == to_plain(plain)


def test_files_beside_the_repository_s_are_read_every_time(tmp_path: Path) -> None:
    seen = []
    for rate in (0.5, 0.25):
        (tmp_path / "taps").mkdir(exist_ok=True)
        (tmp_path / "taps" / "own.yaml").write_text(f"_target_: tbac.models.taps.last_n\nrate: {rate}\n")
        seen.append(compose_all("train", ["run_dir=.", f"hydra.searchpath=[file://{tmp_path}]", "taps=own"]).taps.rate)
    assert seen == [0.5, 0.25]

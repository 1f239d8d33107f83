"""Checkpoints and exports from elsewhere are data: whatever they name, nothing is imported or called."""

import ast
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from tbac.models import UniImage
from tbac.models.export import read_export
from tbac.models.saved import read_checkpoint, read_saved_model
from tests.helpers.commands import FEW, run_to_message
from tests.helpers.families import sample_family
from tests.helpers.source import CODE, list_files, parse
from tests.helpers.worlds import load_small_model

TRACE = "executed"  # what each of these makes in the working folder when it is called
KINDS: dict[str, dict[str, Any]] = {
    "pathlib.Path.write_text": {"_args_": [{"_target_": "pathlib.Path", "_args_": [TRACE]}, "text"]},
    "shutil.copyfile": {"_args_": ["bait", TRACE]},
    "torch.load": {"f": "bait", "weights_only": False},
    "os.system": {"_args_": [f"touch {TRACE}"]},
    "builtins.eval": {"_args_": [f"open({TRACE!r}, 'w')"]},
    "builtins.exec": {"_args_": [f"open({TRACE!r}, 'w')"]},
    "subprocess.run": {"_args_": [["touch", TRACE]]},
    "hydra.utils.instantiate": {"_args_": [{"_target_": "os.system", "_args_": [f"touch {TRACE}"]}]},
    "tbac.models.loading.load_model": {"taps": {"_target_": "os.system", "_args_": [f"touch {TRACE}"]}},
}
NAMES = list(KINDS)


class Bait:
    """A pickle of it makes the trace when it is read."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path(TRACE),)  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def _bait(in_world: Path) -> None:
    torch.save(Bait(), "bait")


@pytest.fixture(scope="module")
def exported(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the small model; no test changes it."""
    folder = tmp_path_factory.mktemp("exports") / "out"
    load_small_model(world_folder).save_pretrained(folder)
    return folder


def names(kind: str, text: str) -> bool:
    """Whether a message names what the file wanted, or what that would have called."""
    return kind in text or (
        kind in ("hydra.utils.instantiate", "tbac.models.loading.load_model") and "os.system" in text
    )


def named(kind: str) -> dict[str, Any]:
    return {"_target_": kind, **KINDS[kind]}


def put_into_model(config: dict[str, Any], kind: str) -> None:
    config.update(named(kind))


def put_into_taps(config: dict[str, Any], kind: str) -> None:
    config["taps"] = named(kind)


def put_beside_the_plan(config: dict[str, Any], kind: str) -> None:
    config["taps"] |= named(kind)


def put_into_ladder(config: dict[str, Any], kind: str) -> None:
    config["ladder"] = named(kind)


def put_into_connector(config: dict[str, Any], kind: str) -> None:
    config["ladder"]["connector"] = named(kind)


def put_into_transformer(config: dict[str, Any], kind: str) -> None:
    config["architecture"]["transformer"]["norm_eps"] = named(kind)


def put_into_architecture(config: dict[str, Any], kind: str) -> None:
    config["architecture"]["mllm"] = {"text_config": {"layers": [1, named(kind)]}}


def put_into_scheduler(config: dict[str, Any], kind: str) -> None:
    config["architecture"]["scheduler"]["flow_shift"] = named(kind)


def put_as_scheduler(config: dict[str, Any], kind: str) -> None:
    config["architecture"]["scheduler"]["_class_name"] = kind


def put_as_connector(config: dict[str, Any], kind: str) -> None:
    config["ladder"]["connector"] = kind


TRIED = 6  # kinds for each command, at other places for each
PLACES = (
    put_into_model,
    put_into_taps,
    put_beside_the_plan,
    put_into_ladder,
    put_into_connector,
    put_into_transformer,
    put_into_architecture,
    put_into_scheduler,
    put_as_scheduler,
    put_as_connector,
)


def write_checkpoint(run: Path, place: Callable[[dict[str, Any], str], None], kind: str) -> Path:
    """A copy of a run's checkpoint whose model config names something."""
    checkpoint = torch.load(run / "checkpoints" / "t2i_pretrain-step=2.ckpt", weights_only=True)
    place(checkpoint["tbac"]["config"]["model"], kind)
    torch.save(checkpoint, "foreign.ckpt")
    return Path("foreign.ckpt")


def write_export(folder: Path, place: Callable[[dict[str, Any], str], None], kind: str) -> Path:
    """A copy of an exported folder whose config names something."""
    target = Path("foreign")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    place(config, kind)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("kind", NAMES[:3])  # the others Hydra itself refuses by now
def test_what_is_refused_would_do_something(kind: str) -> None:
    instantiate(named(kind))
    assert Path(TRACE).exists()


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("kind", NAMES)
def test_nothing_that_a_file_names_is_called(exported: Path, kind: str, place: Callable[..., None]) -> None:
    config = read_export(exported).config.to_dict()
    place(config, kind)
    checkpoint = {"tbac": {"frozen": {}, "config": {"model": config}, "taps": config["taps"]}, "state_dict": {}}
    with pytest.raises(ValueError, match=r"x\.ckpt: ") as error:
        read_saved_model(checkpoint, "x.ckpt")
    assert names(kind, str(error.value))
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        read_export(write_export(exported, place, kind))
    assert names(kind, str(error.value))
    assert not Path(TRACE).exists()


def choose(command: str, number: int) -> tuple[str, Callable[[dict[str, Any], str], None]]:
    """A kind and a place, others for each command."""
    shift = list(COMMANDS).index(command)
    return NAMES[(number + shift) % len(NAMES)], PLACES[(number + 3 * shift) % len(PLACES)]


COMMANDS = {
    "generate": ["generate", "prompts=[a]", "out=made", "checkpoint={}"],
    "answer": ["answer", "question=what?", "checkpoint={}"],
    "export": ["export", "out=exported", "checkpoint={}"],
    "evaluate": ["evaluate", "benchmark=answers", "out=scores", "checkpoint={}"],
    "train init": ["train", *FEW, "hydra.run.dir=next", "init={}"],
    "train resume": ["train", *FEW, "stage.steps=3", "hydra.run.dir=next", "resume={}"],
}


@pytest.mark.usefixtures("trained_run")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("number", sample_family(range(TRIED), 2))
def test_every_command_refuses_such_a_checkpoint(command: str, number: int, capfd: pytest.CaptureFixture[str]) -> None:
    kind, place = choose(command, number)
    file = write_checkpoint(Path("run"), place, kind)
    name, *arguments = [part.format(file) for part in COMMANDS[command]]
    text = run_to_message(name, capfd, *arguments)
    assert "error: foreign.ckpt: " in text
    assert names(kind, text)
    assert not Path(TRACE).exists()
    assert not any(Path(folder).exists() for folder in ("made/00000.png", "exported", "scores/report.json"))


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train resume"])
@pytest.mark.parametrize("number", sample_family(range(TRIED), 2, seed=1))
def test_every_command_refuses_such_an_export(
    exported: Path, command: str, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    kind, place = choose(command, number)
    folder = write_export(exported, place, kind)
    name, *arguments = [part.format(folder) for part in COMMANDS[command]]
    text = run_to_message(name, capfd, *arguments)
    assert "error: foreign/config.json: " in text
    assert names(kind, text)
    assert not Path(TRACE).exists()


@pytest.mark.parametrize("name", ["os.system", "DiffusionPipeline", "AutoencoderDC", "", None, ["DDIMScheduler"]])
def test_the_scheduler_of_a_base_model_is_one_of_a_fixed_list(in_world: Path, tmp_path: Path, name: Any) -> None:
    shutil.copytree(in_world / "backbones" / "denoiser", tmp_path / "denoiser")
    file = tmp_path / "denoiser" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": name}))
    with pytest.raises(ValueError, match="the scheduler config names the class"):
        load_small_model(in_world, f"model.denoiser={tmp_path / 'denoiser'}")


def test_a_checkpoint_that_holds_code_isn_t_read() -> None:
    torch.save({"tbac": Bait(), "state_dict": {}}, "foreign.ckpt")
    with pytest.raises(ValueError, match=r"foreign\.ckpt can't be read as a checkpoint"):
        read_checkpoint("foreign.ckpt")
    assert not Path(TRACE).exists()


# What may be made by its name: a part of the config that Hydra has composed for this command.
COMPOSED = ("cfg", "configs", "c", "part", "options", "model_config", "compose_training")
MAKERS = (
    "make_part", "check_target", "instantiate", "get_object", "get_class", "get_method", "get_static_method",
    "import_module", "__import__",
)  # fmt: skip
READERS = ("read_checkpoint", "read_saved_model", "read_export", "safe_load", "OmegaConf")


def list_names(node: ast.AST) -> set[str]:
    """Every name and attribute in a piece of code."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def find_root(node: ast.AST) -> str:
    """The name that an expression such as `cfg.stages[0].data` begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return ast.unparse(node)


def is_maker(called: str) -> bool:
    """Whether a function makes what a config names; methods of that name do other things."""
    return called.split(".")[-1] in MAKERS and not called.endswith(".make_part")


def test_only_the_user_s_own_config_is_made_by_name() -> None:
    seen = 0
    for file in list_files(*CODE):
        functions = [node for node in ast.walk(parse(file)) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            made = [call for call in calls if is_maker(ast.unparse(call.func))]
            for call in made:
                assert find_root(call.args[0]) in COMPOSED, f"{file}: {ast.unparse(call)}"
            if made:
                reads = list_names(function) & set(READERS)
                assert not reads, f"{file}: {function.name} makes parts by name and reads a file with {reads}"
            seen += len(made)
    assert seen > 10


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "evil.C"}}, "no code of a model's folder is run"),
        (
            "config.json",
            {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}},
            "model_type qwen2_5_vl, got 'evil'",
        ),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.C", "evil.C"]}}, ""),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.C"}}, ""),
    ],
)
def test_no_code_of_a_folder_is_run(
    in_world: Path, monkeypatch: pytest.MonkeyPatch, file: str, change: dict[str, Any], words: str
) -> None:
    """A standalone export may hold any file; the library would offer to run one that a config names, and hear yes."""
    load_small_model(in_world).save_pretrained("out", standalone=True)
    Path("out/mllm/evil.py").write_text(f"open({TRACE!r}, 'w')\nclass C: pass\n")
    config = Path("out/mllm") / file
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=words) if words else nullcontext():
        UniImage.from_pretrained("out")
    assert not Path(TRACE).exists()

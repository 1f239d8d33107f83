"""Every option of every command says what it accepts, and a wrong value is one message that names it."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tbac.app.arguments import quote, read_arguments
from tbac.app.kinds import Kind, list_of, new_folder, number, optional, path, whole
from tbac.app.options import COMMANDS, check_config, find_kind
from tbac.app.parts import STAGE, Part, Parts
from tests.helpers.configs import REQUIRED, compose_config

HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 1.5, math.nan, math.inf, -math.inf, 2**31, 2**64, 10**400, -(10**30), 1e300, "", " ",
    "x", "fast", "../up", "a/b", "a\0b", "\ud800", "x" * 5000, "~nobody_of_this_name/x", [], [[]], [None], ["a", "a"],
    [1, "a"], {}, {"a": 1}, {"path": 5}, [{"path": "x", "foo": 1}], [{}], ["a\0b"], object(), b"x", "null", "${x}",
]  # fmt: skip


def list_kinds(fields: Any, name: str) -> Iterator[tuple[str, Kind]]:
    """Every option below some fields, and what it accepts."""
    if isinstance(fields, Kind):
        yield name, fields
    elif isinstance(fields, Parts):
        yield from list_kinds(fields.part, name)
    elif isinstance(fields, Part):
        for options in fields.options.values():
            yield from list_kinds(options, name)
    else:
        for key, below in fields.items():
            yield from list_kinds(below, f"{name}.{key}".lstrip("."))


ALL = [pair for fields in COMMANDS.values() for pair in list_kinds(fields, "")]
KINDS = [(option, kind) for option, kind in ALL if kind.accepted not in ("anything", "a mapping")]


def test_a_hostile_value_is_refused_by_name_or_read_as_what_it_says() -> None:
    """All options of all commands, with values of every type: some 15,000 inputs."""
    tried = 0
    for option, kind in KINDS:
        for value in HOSTILE:
            tried += 1
            accepted, meant = try_to_read(kind, option, value)
            if not accepted:
                assert meant.startswith(f"{option} must be "), meant
                assert len(meant) < 1000
                continue
            # What is accepted is the value itself, or the one that it stands for, and can be read again.
            assert kind.check(option, meant) == meant
            if isinstance(meant, float):
                assert math.isfinite(meant)
    assert len(ALL) - len(KINDS) < 50  # what the classes of models, Lightning and submitit check themselves
    assert tried > 10_000


def try_to_read(kind: Kind, option: str, value: Any) -> tuple[bool, Any]:
    """Whether a value is accepted, and the one that it stands for, or else the message."""
    try:
        return True, kind.check(option, value)
    except ValueError as error:
        return False, str(error)


@pytest.mark.parametrize("option", sorted(STAGE))
def test_no_option_of_a_stage_accepts_everything(option: str) -> None:
    kind = STAGE[option]
    if isinstance(kind, Kind):
        refused = [value for value in HOSTILE if not try_to_read(kind, option, value)[0]]
        assert len(refused) > len(HOSTILE) / 2


@pytest.mark.parametrize(
    ("kind", "value", "meant"),
    [
        (whole(), 1e3, 1000),
        (list_of(path()), "a.png", ["a.png"]),
        (list_of(whole()), 3, [3]),
        (optional(whole()), None, None),
        (number(above=0), 3, 3),
        (STAGE["trainable"], "denoiser", ["denoiser"]),
        (STAGE["sources"], "data/a", [{"path": "data/a", "split": "train"}]),
        (STAGE["sources"], {"path": "data/a"}, [{"path": "data/a"}]),
        (STAGE["sample_prompts"], "a red circle", ["a red circle"]),
    ],
)
def test_one_value_where_a_list_belongs_is_a_list_of_one(kind: Any, value: Any, meant: Any) -> None:
    assert kind.check("x", value) == meant


def test_a_path_begins_with_the_home_folder_and_is_no_file_where_a_folder_is_made(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert path().check("x", "~/data") == "/home/someone/data"
    assert STAGE["sources"].check("x", [{"path": "~/data"}]) == [{"path": "/home/someone/data"}]  # type: ignore[union-attr]
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="out must be the path of a folder"):
            new_folder().check("out", str(place))


TEXTS = [
    "outputs/train/x/checkpoints/t2i_pretrain-step=2.ckpt", "stage.lr=0.001,taps=last_n/checkpoints/a-step=2.ckpt",
    "taps.layers=[1,2]/last.ckpt", "a b", "a, b", "it's", 'say "yes"', "a:b", "{a}", "[a]", "(a)", "12", "1e3", "true",
    "null.ckpt", "-x", "a\\b", "a\\", "a\\'b", "猫.ckpt", "a=b=c", "@x", "a;b", "*", "nan", "$HOME", "a#b", "%(x)s",
]  # fmt: skip


@pytest.mark.parametrize("value", TEXTS)
@pytest.mark.parametrize("option", ["checkpoint", "out", "mllm", "negative_prompt", "prompt_file"])
def test_a_text_on_a_command_line_is_read_as_it_is(option: str, value: str) -> None:
    (line,) = read_arguments([f"{option}={value}"], lambda name: find_kind("generate", name))
    (override,) = OverridesParser.create().parse_overrides([line])
    read = override.value()
    assert (read if isinstance(read, str) else read.text) == value  # type: ignore[union-attr]
    # Reading it twice changes nothing: a process that is started by this one gets the same line.
    assert read_arguments([line], lambda name: find_kind("generate", name)) == [line]
    assert OverridesParser.create().parse_overrides([f"x={quote(value)}"])[0].value() in (value, read)


@pytest.mark.parametrize(
    ("command", "argument", "meant"),
    [
        ("generate", "prompts=a red circle", "a red circle"),
        ("generate", "prompts=a red circle, left of a square", "a red circle, left of a square"),
        ("generate", "images=a=b.png", "a=b.png"),
        ("generate", "images=[a=b.png,c.png]", ["a=b.png", "c.png"]),
        ("generate", 'prompts=["a, b",c]', ["a, b", "c"]),
        ("train", "stage.sources=[{path: data/a=b, split: train}]", [{"path": "data/a=b", "split": "train"}]),
        ("train", "stage_overrides.finetune=[stage.lr=1e-5]", ["stage.lr=1e-5"]),
        ("train", "stage.lr=1e-3", 1e-3),
        ("train", "taps.layers=[1,2]", [1, 2]),
        ("train", "init=null", None),
        ("train", "init='quoted'", "quoted"),
    ],
)
def test_lists_and_mappings_with_equals_signs_are_read(command: str, argument: str, meant: Any) -> None:
    (line,) = read_arguments([argument], lambda name: find_kind(command, name))
    assert OverridesParser.create().parse_overrides([line])[0].value() == meant


def test_a_sweep_over_paths_is_still_one() -> None:
    def read(line: str) -> Any:
        (line,) = read_arguments([line], lambda name: find_kind("train", name), multirun=True)
        return OverridesParser.create().parse_overrides([line])[0]

    assert list(read("init=a,b").sweep_iterator()) == ["a", "b"]
    assert list(read("init=a-step=1.ckpt,b-step=2.ckpt").sweep_string_iterator()) == [
        "'a-step=1.ckpt'",
        "'b-step=2.ckpt'",
    ]
    assert not read("init=a-step=1.ckpt").is_sweep_override()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_key_of_a_shipped_config_is_an_option(command: str, in_world: Any) -> None:
    """And another key is refused, wherever it is added."""
    check_config(command, compose_config(command, *REQUIRED.get(command, [])))
    with pytest.raises(ValueError, match="foo isn't an option"):
        check_config(command, compose_config(command, *REQUIRED.get(command, []), "+foo=1"))


@pytest.mark.parametrize(
    "place",
    ["stage", "machine", "optim", "schedule", "flow", "data", "guard", "callbacks.ema", "callbacks.guard", "trainer",
     "stage.dropout", "trainer.strategy", "logger"],
)  # fmt: skip
def test_a_key_below_a_group_is_an_option_too(place: str, in_world: Any) -> None:
    with pytest.raises(ValueError, match=rf"{place}.foo isn't an option"):
        check_config("train", compose_config("train", "run_dir=.", f"+{place}.foo=1"))

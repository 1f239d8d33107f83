"""The position in the data that a checkpoint holds: refused where it can't be read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.shards.writer import write_shards
from tbac.data.datamodule import ShardDataModule
from tests.helpers.pictures import make_noise_image


def write(first: int = 0) -> None:
    samples = ((f"s{i}", {"png": make_noise_image(first + i, (8, 8)), "txt": f"caption {i}"}) for i in range(6))
    write_shards(Path("shards"), "train", samples, 3)


def open_data() -> ShardDataModule:
    return ShardDataModule([{"path": "shards"}], [], batch_size=2, image_size=8)


def change(**fields: Any) -> Callable[[dict], Any]:
    return lambda state: state | fields


def change_source(**fields: Any) -> Callable[[dict], Any]:
    return lambda state: state | {"sources": [state["sources"][0] | fields]}


STATES: dict[str, Callable[[dict], Any]] = {
    "null": lambda state: None,
    "a list": lambda state: [],
    "empty": lambda state: {},
    **{f"without {name}": lambda state, name=name: {k: v for k, v in state.items() if k != name}  # type: ignore[misc]
       for name in ("position", "sources", "circumstances")},
    **{f"position {value!r}": change(position=value) for value in (-1, 1.5, "3", None, True, [], float("nan"), 10**30)},
    **{f"sources {value!r}": change(sources=value) for value in (None, {}, "x", [3], [{}])},
    **{f"waiting {value!r}": change(waiting=value) for value in (None, 3, [3], [[1, 2]], [[1, 0, -1]], [["a", 0, 0]])},
    **{f"circumstances {value!r}": change(circumstances=value) for value in (None, [], "x")},
    **{f"drawn {value!r}": change_source(drawn=value) for value in (-1, None, "3", 0.5, [])},
    **{f"samples {value!r}": change_source(samples=value) for value in (-1, None, "3", 0.5)},
    "path": change_source(path=3),
}  # fmt: skip


@pytest.mark.parametrize("what", STATES)
def test_a_state_of_another_form_is_refused_in_one_message(what: str) -> None:
    write()
    data = open_data()
    state = data.state_dict()
    with pytest.raises(ValueError, match="the position in the data that the checkpoint holds can't be read"):
        open_data().load_state_dict(STATES[what](state))
    open_data().load_state_dict(json.loads(json.dumps(state)))

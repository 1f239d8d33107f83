"""Kept prompts: conditions equal those of prompts that run each time, and a file never stands for what it isn't."""

import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from tbac.files import write_whole
from tbac.models import UniImage
from tbac.models.kept import FileStore, MemoryStore, pack
from tbac.models.kept_prompts import PromptCache
from tbac.models.prompt_cache import GIB, PromptCacheConfig, make_prompt_cache
from tbac.types import Batch, Condition
from tests.helpers.pictures import make_noise_image, make_prompt_cases
from tests.helpers.worlds import load_small_model

TEXTS = ["a red circle", "", "three green squares and a letter L at the top left on a black background"]


def make_cache(model: UniImage, keep: str = "prompts", folder: str | None = "kept", **options: Any) -> PromptCache:
    precision = options.pop("precision", "32-true")
    cache = make_prompt_cache(PromptCacheConfig(keep, folder, **options), model, precision)
    assert cache is not None
    return cache


def read_files(folder: str = "kept") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).glob("*/??/*.safetensors")}


def assert_same(found: Condition, expected: Condition) -> None:
    """Assert that two conditions agree, but for the states of padding, which are anything."""
    assert (found.mask is None) == (expected.mask is None)
    real = torch.ones(expected.states.shape[1:3], dtype=torch.bool)
    if expected.mask is not None:
        assert torch.equal(found.mask, expected.mask)
        real = expected.mask.bool()
    torch.testing.assert_close(found.states[:, real], expected.states[:, real], rtol=1e-5, atol=1e-5)
    assert (found.reference is None) == (expected.reference is None)
    if expected.reference is not None:
        torch.testing.assert_close(found.reference, expected.reference)


@pytest.mark.parametrize("folder", ["kept", None])
@pytest.mark.parametrize("keep", ["prompts", "images"])
@pytest.mark.parametrize("options", [(), ("ladder.prompt_context=true", "model.reference_latents=true")])
def test_conditions_equal_those_of_prompts_that_run(
    in_world: Path, keep: str, folder: str | None, options: tuple[str, ...]
) -> None:
    model = load_small_model(in_world, *options)
    cache = make_cache(model, keep, folder)
    computed = []
    # Everything is missing at first; then some prompts are, in batches of other widths; and at last nothing is.
    for case in ("text", "one_image", "several_images", "mixed", "mixed", "text"):
        texts, images = make_prompt_cases()[case]
        expected = model.encode_condition(model.prompt(texts, images))
        found = model.encode_condition(Batch(cache(texts, images), texts).to("cpu").prompt)
        assert_same(found, expected)
        assert (found.mask is None) == (options == ())
        computed.append(cache.computed)
    assert computed[3] == computed[5] > computed[0]
    found.states.sum().backward()
    assert model.ladder.queries.grad is not None
    if folder:
        inputs = cache(*make_prompt_cases()["mixed"])  # what a loader process does: nothing is left to compute
        assert "waiting" not in inputs
        assert "pixel_values" not in inputs


@pytest.mark.parametrize("keep", ["prompts", "images"])
def test_what_is_kept_does_not_depend_on_the_batch(model: UniImage, keep: str) -> None:
    texts, images = make_prompt_cases()["one_image"]
    together, alone = make_cache(model, keep, "together"), make_cache(model, keep, "alone")
    model.prompt_cache = together
    model.encode_condition(together(texts, images))
    model.prompt_cache = alone
    for text, group in reversed(list(zip(texts, images or [], strict=True))):
        model.encode_condition(alone([text], [group]))
    assert read_files("together") == read_files("alone")
    assert len(read_files("alone")) == 3


@pytest.mark.parametrize("keep", ["prompts", "images"])
def test_mixed_precision_is_kept_in_its_own_type(model: UniImage, keep: str) -> None:
    texts, images = make_prompt_cases()["mixed"]
    cache = make_cache(model, keep, precision="bf16-mixed")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.encode_condition(model.prompt(texts, images)).states
        for _ in range(2):
            found = model.encode_condition(cache(texts, images)).states
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    name = "keys_values" if keep == "prompts" else "features"
    assert {load(content)[name].dtype for content in read_files().values()} == {torch.bfloat16}
    assert make_cache(model, keep).fingerprint != cache.fingerprint


def test_a_prompt_that_stands_twice_in_a_batch_runs_once(model: UniImage) -> None:
    cache = make_cache(model, folder=None, max_gib=1e-9)  # nothing fits
    model.encode_condition(cache(["", "a", ""]))
    assert cache.computed == 2


def test_runs_of_other_taps_share_the_entries(in_world: Path) -> None:
    shallow = load_small_model(in_world, "taps=single", "taps.layer=2", "ladder.prompt_context=true")
    deep = load_small_model(in_world, "taps=final", "ladder.prompt_context=true")
    middle = load_small_model(in_world, "taps=single", "taps.layer=2")
    computed = []
    for model in (shallow, deep, shallow, middle):
        cache = make_cache(model)
        assert_same(model.encode_condition(cache(TEXTS)), model.encode_condition(model.prompt(TEXTS)))
        computed.append(cache.computed)
    assert computed == [3, 3, 0, 0]  # the deep entries hold the shallow ones' tapped states too


def test_keys_tell_apart_what_changes_the_numbers(model: UniImage) -> None:
    cache = make_cache(model)
    one, two = make_noise_image(1, (4, 2)), make_noise_image(2, (4, 2))
    keys = [
        cache.make_key("a", []), cache.make_key("b", []), cache.make_key("", []), cache.make_key(None, []),
        cache.make_key("a", [one]), cache.make_key("a", [two]), cache.make_key("a", [one, two]),
        cache.make_key("a", [two, one]), cache.make_key("a", [one.transpose(Image.Transpose.ROTATE_90)]),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert cache.make_key("a", [one.convert("RGBA")]) == keys[4]


@pytest.mark.parametrize(
    "override",
    ["model.image_pixels=1024", "model.max_text_tokens=9", "model.system_prompt=Look.", "model.spell_words=true"],
)
def test_other_prompt_code_has_other_keys(in_world: Path, override: str) -> None:
    fingerprints = {make_cache(load_small_model(in_world, *o)).fingerprint for o in ((), (override,))}
    assert len(fingerprints) == 2
    assert len({json.dumps(json.loads(f.read_text())) for f in Path("kept").glob("*/about.json")}) == 2


def spoil(kind: str, file: Path, other: Path) -> None:
    """Make a file what it shouldn't be."""
    content = file.read_bytes()
    changed = bytearray(content)
    changed[-3] ^= 1
    spoilt = {
        "torn": content[:-100],
        "torn in its header": content[:50],
        "empty": b"",
        "a bit": bytes(changed),
        "foreign": save({"keys_values": torch.zeros(6, 2, 2, 5, 24), "next_position": torch.tensor(3)}),
        "garbage": b"\xff" * 200,
        "of another prompt": other.read_bytes(),
        "of another version": content.replace(rb"\"version\": \"1\"", rb"\"version\": \"0\""),
    }
    file.write_bytes(spoilt[kind])
    assert file.read_bytes() != content


@pytest.mark.parametrize(
    "kind",
    ["torn", "torn in its header", "empty", "a bit", "foreign", "garbage", "of another prompt", "of another version"],
)
def test_a_file_that_is_not_right_is_named_and_written_anew(
    model: UniImage, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = make_cache(model)
    expected = model.encode_condition(cache(TEXTS)).states
    before = read_files()
    store = cache.store
    assert isinstance(store, FileStore)
    file, other = (store.locate(cache.make_key(text, [])) for text in TEXTS[:2])
    spoil(kind, file, other)
    assert torch.equal(model.encode_condition(cache(TEXTS)).states, expected)
    assert str(file) in caplog.text
    assert cache.computed == 4
    assert read_files() == before


def test_a_full_disk_ends_nothing(
    model: UniImage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = make_cache(model)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        for _ in range(2):
            states = model.encode_condition(cache(TEXTS)).states
    torch.testing.assert_close(states, model.encode_condition(model.prompt(TEXTS)).states, rtol=1e-5, atol=1e-5)
    assert caplog.text.count("No space left") == 1
    assert not [file for file in Path("kept").rglob("*") if file.is_file() and file.name != "about.json"]


@pytest.mark.parametrize("folder", ["kept", None])
def test_what_does_not_fit_is_not_kept(model: UniImage, folder: str | None, caplog: pytest.LogCaptureFixture) -> None:
    cache = make_cache(model, folder=folder)
    model.encode_condition(cache(TEXTS[:1]))
    store: Any = cache.store
    limited = make_cache(model, folder=folder, max_gib=(store.bytes + 10) / GIB)
    for _ in range(2):
        model.encode_condition(limited(TEXTS))
    assert limited.store.bytes <= limited.store.max_bytes
    assert len(limited.store) == 1
    assert caplog.text.count("is full") == 1


def _fill(folder: Path, keys: list[str]) -> None:
    store = FileStore(folder, GIB)
    for key in keys:
        store.write(key, {"x": torch.full((4000,), float(int(key, 16)))})


def test_processes_fill_a_folder_side_by_side() -> None:
    keys = [f"{number:064x}" for number in range(60)]
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_fill, args=(Path("kept"), order)) for order in (keys, keys, keys[::-1])]
    for writer in writers:
        writer.start()
    store = FileStore(Path("kept"), GIB)
    while any(writer.is_alive() for writer in writers):
        for key in keys:
            entry = store.read(key)
            assert entry is None or (entry["x"] == int(key, 16)).all()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(FileStore(Path("kept"), GIB)) == 60
    assert len(list(Path("kept").rglob("*.*"))) == 60  # no temporary file is left


def test_entries_that_are_gone_are_no_entries() -> None:
    _fill(Path("kept"), [f"{number:064x}" for number in range(2)])
    (Path("kept/00") / "gone.safetensors").symlink_to("nowhere")
    store = FileStore(Path("kept"), GIB)
    assert len(store) == 2
    assert store.bytes == sum(file.stat().st_size for file in Path("kept").rglob(f"{0:02x}*.safetensors"))


def test_memory_is_counted_and_nothing_of_a_batch_is_held() -> None:
    store, whole = MemoryStore(1000), torch.zeros(100, 100)
    for _ in range(3):
        store.write("a", {"x": whole[0]})
    assert store.bytes == 400
    kept = store.read("a")
    assert kept is not None
    assert kept["x"].untyped_storage().nbytes() == 400


def test_a_file_is_the_same_whatever_the_order_of_its_tensors() -> None:
    x, y = torch.ones(3), torch.zeros(2)
    assert pack("0" * 64, {"x": x, "y": y}) == pack("0" * 64, {"y": y, "x": x})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": "taps"}, "prompt_cache.keep must be null or one of prompts, images; got 'taps'"),
        ({"max_gib": 0}, "prompt_cache.max_gib must be a number above 0, got 0"),
        ({"folder": "file"}, "prompt_cache.folder=file must be a folder, and is a file"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], words: str) -> None:
    write_whole(Path("file"), b"")
    with pytest.raises(ValueError, match=words):
        PromptCacheConfig(**options)

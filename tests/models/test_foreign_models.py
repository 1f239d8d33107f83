"""Exports and base folders from anywhere: whatever their files hold, opening one works or names the file."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tbac.models import UniImage
from tbac.models.architecture import check_config
from tbac.models.config import ModelConfig
from tbac.models.export import read_export
from tbac.models.prompt import PromptProcessor
from tbac.models.weights import WeightFiles, load_tensors
from tests.helpers.worlds import load_small_model

NAN, INFINITE = float("nan"), float("inf")
# What may stand in place of a number, a text, a list or a mapping.
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    10**12,
    10**30,
    1.5e300,
    NAN,
    INFINITE,
    "text",
    "",
    [],
    [1, [2]],
    {},
    {"a": 1},
    "os.system",
]
BYTES: list[bytes] = [
    b"",
    b"[]",
    b"5",
    b"null",
    b"{}",
    b"{",
    b"\xff\xfe{}",
    b"\x00" * 100,
    b"[" * 50_000,
    b'{"a":' * 50_000,
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": "\\ud800"}',
]
SECONDS = 10


@pytest.fixture(scope="module")
def original(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A standalone export of the small model; no test changes it."""
    folder = tmp_path_factory.mktemp("exports") / "out"
    load_small_model(world_folder).save_pretrained(folder, standalone=True)
    return folder


@pytest.fixture
def folder(original: Path) -> Path:
    return shutil.copytree(original, Path("out").absolute())


def name_of(value: Any) -> str:
    return json.dumps(value)[:40] if not isinstance(value, bytes) else repr(value[:20])


def put(values: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Plain values with another value at one place."""
    changed = json.loads(json.dumps(values))
    target = changed
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return changed


def assert_refused(open_it: Callable[[], Any], what: str, *words: str) -> None:
    """Opening ends soon in one line that names the file, and in nothing else."""
    started = time.monotonic()
    with pytest.raises(ValueError, match=r".") as error:  # noqa: PT012
        open_it()
        pytest.fail(f"accepted {what}")
    assert time.monotonic() - started < SECONDS, what
    text = str(error.value)
    assert "\n" not in text, what
    assert len(text) < 1500, what
    assert any(word in text for word in words), f"{what}: {text}"


# The config of an export -> values that are fine there.
FINE_LISTS = (None, [])
EXPORT: dict[tuple[Any, ...], tuple[Any, ...]] = {
    ("format",): (),
    ("frozen_digests",): (),
    ("frozen_digests", "mllm"): (),
    ("mllm",): (),
    ("denoiser",): (),
    ("image_pixels",): (10**12, 10**30),
    ("taps",): (),
    ("taps", "layers"): (),
    ("taps", "assignment"): (),
    ("taps", "mixed"): (),
    ("taps", "num_blocks"): (),
    ("ladder",): ({},),
    ("ladder", "connector"): (),
    ("num_queries",): (),
    ("dtype",): (),
    ("architecture",): (None, {}),
    ("architecture", "transformer"): (None,),  # that of the base model is used
    ("architecture", "transformer", "num_layers"): (),
    ("architecture", "transformer", "in_channels"): (),
    ("architecture", "transformer", "num_attention_heads"): (),
    ("architecture", "transformer", "attention_head_dim"): (),
    ("architecture", "transformer", "caption_channels"): (),
    ("architecture", "transformer", "sample_size"): (),
    ("architecture", "transformer", "patch_size"): (),
    ("architecture", "transformer", "mlp_ratio"): (),
    ("architecture", "transformer", "norm_eps"): (True, 0, {}, 10**12),
    ("architecture", "scheduler"): (None,),
    ("architecture", "scheduler", "_class_name"): (),
    ("architecture", "scheduler", "num_train_timesteps"): (),
}


@pytest.mark.parametrize("place", EXPORT, ids=lambda place: ".".join(place))
def test_an_export_s_config_of_wrong_values_is_named(folder: Path, place: tuple[Any, ...]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    fine = [name_of(value) for value in EXPORT[place]]
    accepted = []
    for value in VALUES:
        file.write_text(json.dumps(put(config, place, value)))
        if name_of(value) not in fine:
            assert_refused(
                lambda: UniImage.from_pretrained(folder), f"{place}={name_of(value)}", "out", "denoiser", place[-1]
            )
        else:
            accepted.append(value)
    assert len(accepted) < len(VALUES) / 2


@pytest.mark.parametrize("content", BYTES, ids=name_of)
@pytest.mark.parametrize(
    "path",
    [
        "config.json",
        "model.safetensors",
        "mllm/config.json",
        "mllm/model.safetensors",
        "mllm/tokenizer.json",
        "mllm/tokenizer_config.json",
        "mllm/preprocessor_config.json",
        "denoiser/vae/config.json",
        "denoiser/vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_file_of_other_bytes_is_named(folder: Path, path: str, content: bytes) -> None:
    file = folder / path
    if not file.is_file():
        file = folder / path.replace("preprocessor_config", "processor_config")
    file.write_bytes(content)
    what = f"{path}={content[:20]!r}"
    if path == "mllm/preprocessor_config.json" and content == b"{}":
        return  # the usual image processor, whose patches the vision tower may not read
    assert_refused(lambda: UniImage.from_pretrained(folder), what, "out", "autoencoder", file.name)


MLLM: dict[tuple[Any, ...], tuple[Any, ...]] = {
    ("model_type",): (),
    ("text_config",): (),
    ("text_config", "hidden_size"): (),
    ("text_config", "num_hidden_layers"): (),
    ("text_config", "num_attention_heads"): (),
    ("text_config", "num_key_value_heads"): (),
    ("text_config", "intermediate_size"): (),
    ("text_config", "vocab_size"): (),
    ("vision_config",): (),
    ("vision_config", "depth"): (),
    ("vision_config", "hidden_size"): (),
    ("vision_config", "num_heads"): (),
    ("vision_config", "patch_size"): (),
    ("vision_config", "spatial_merge_size"): (),
    ("image_token_id",): (0,),
}


@pytest.mark.parametrize("place", MLLM, ids=lambda place: ".".join(place))
def test_an_mllm_s_config_of_wrong_values_is_named(folder: Path, place: tuple[Any, ...]) -> None:
    file = folder / "mllm" / "config.json"
    config = json.loads(file.read_text())
    fine = [name_of(value) for value in MLLM[place]]
    for value in VALUES:
        file.write_text(json.dumps(put(config, place, value)))
        if name_of(value) not in fine:
            assert_refused(lambda: UniImage.from_pretrained(folder), f"{place}={name_of(value)}", "mllm")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_that_a_config_names_isn_t_looked_up(folder: Path, key: str) -> None:
    file = folder / "mllm" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps({**config, key: "os.system", "text_config": {**config["text_config"], key: "os.system"}})
    )
    model = UniImage.from_pretrained(folder)
    assert model.mllm.model.dtype == torch.float32
    assert isinstance(model.answer(["what is it?"], None, 2)[0], str)


AUTOENCODER = (
    "latent_channels",
    "in_channels",
    "encoder_block_out_channels",
    "decoder_layers_per_block",
    "encoder_qkv_multiscales",
)


@pytest.mark.parametrize("name", AUTOENCODER)
def test_an_autoencoder_s_config_of_wrong_values_is_named(folder: Path, name: str) -> None:
    file = folder / "denoiser" / "vae" / "config.json"
    config = json.loads(file.read_text())
    for value in VALUES:
        file.write_text(json.dumps(put(config, (name,), value)))
        assert_refused(lambda: UniImage.from_pretrained(folder), f"{name}={name_of(value)}", "denoiser", "autoencoder")


LOOP = "{%% for %s in range(99999) %%}"
ENDLESS = LOOP % "a" + LOOP % "b" + LOOP % "c" + "{% endfor %}" * 3
TEMPLATES = [
    ENDLESS,
    "{{ 'a' * 10 ** 11 }}",
    "{% set x = 'a' * 1000 %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaaaa{% endfor %}{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ 2 ** 2 ** 40 }}",
    "{% broken",
    "{{ nothing.at.all }}",
    "constant",
    "{{ messages }}",
]


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_a_chat_template_without_end_or_sense_is_named(folder: Path, template: str) -> None:
    (folder / "mllm" / "chat_template.jinja").write_text(template)
    assert_refused(lambda: PromptProcessor.from_pretrained(folder / "mllm", image_pixels=576), template, "mllm")


# Weights.


def rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a safetensors file with a change, as a tool of others would: without digests."""
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE])
@pytest.mark.parametrize(
    "path", ["model.safetensors", "mllm/model.safetensors", "denoiser/vae/diffusion_pytorch_model.safetensors"]
)
def test_weights_that_aren_t_finite_are_named(folder: Path, path: str, value: float) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        names = [name for name in sorted(tensors) if "layers.0." in name or "lm_head" not in name]
        next(tensors[name] for name in names if tensors[name].dim() > 1).view(-1)[-1] = value

    rewrite(folder / path, spoil)
    assert_refused(lambda: UniImage.from_pretrained(folder), path, f"{path}: ")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_of_another_type_are_named(folder: Path, dtype: torch.dtype) -> None:
    rewrite(
        folder / "model.safetensors",
        lambda tensors: tensors.update({"ladder.queries": tensors["ladder.queries"].to(dtype)}),
    )
    assert_refused(lambda: UniImage.from_pretrained(folder), str(dtype), "ladder.queries")


def test_a_flipped_bit_of_an_export_is_named_with_its_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for share in range(1, 20):
        damaged = bytearray(content)
        damaged[len(content) * share // 20] ^= 4
        file.write_bytes(damaged)
        assert_refused(lambda: read_export(folder), f"byte {share}/20", "is damaged: ")
    file.write_bytes(content)
    assert load_tensors(file).keys() == load_file(file).keys()


@pytest.mark.parametrize(
    "names",
    [
        None,
        [],
        "text",
        {"a": 5},
        {"a": "../../model.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "x.bin"},
        {},
        {"a": None},
    ],
)
def test_an_index_that_names_files_elsewhere_is_refused(folder: Path, names: Any) -> None:
    (folder / "mllm" / "model.safetensors").unlink()
    (folder / "mllm" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert_refused(lambda: WeightFiles(folder / "mllm"), str(names), "weight_map")


@pytest.mark.parametrize("digests", [None, {}, [], {"mllm": "0" * 64}, {"mllm": None}, {"other": "0" * 64}, "text"])
def test_an_export_without_digests_takes_no_other_mllm(folder: Path, digests: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"frozen_digests": digests}))
    assert_refused(lambda: UniImage.from_pretrained(folder), str(digests), "frozen_digests", "was trained on another")


@pytest.mark.parametrize("source", ["~nobody-has-this-name", "a" * 10_000, "a\x00b", "", None, 5])
@pytest.mark.parametrize("part", ["mllm", "denoiser"])
def test_a_source_that_can_t_be_a_path_is_named(folder: Path, part: str, source: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: source}))
    assert_refused(lambda: UniImage.from_pretrained(folder), str(source)[:20], part)


def test_the_whole_model_s_options_are_fine(original: Path) -> None:
    config = read_export(original).config
    assert isinstance(config, ModelConfig)
    check_config(config, opened=True)

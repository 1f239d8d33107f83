"""The composed model: saving, loading, refusing what doesn't fit."""

import json
import re
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file

from tbac.models import UniImage
from tbac.sampling import UniImagePipeline
from tests.helpers.configs import compose_config
from tests.helpers.pictures import make_noise_image
from tests.helpers.worlds import load_all_parts, load_small_model


def same_tensors(first: UniImage, second: UniImage) -> bool:
    a, b = load_all_parts(first).state_dict(), load_all_parts(second).state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("standalone", [False, True])
def test_an_export_loads_bit_for_bit(model: UniImage, tmp_path: Path, standalone: bool) -> None:
    model.save_pretrained(tmp_path / "export", standalone=standalone)
    again = UniImage.from_pretrained(tmp_path / "export")
    assert same_tensors(model, again)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["num_queries"] == 9
    assert config["image_pixels"] == 576
    first, second = (m.encode_condition(m.prompt(["a circle"], [[make_noise_image(0)]])).states for m in (model, again))
    assert torch.equal(first, second)


def test_a_slim_export_holds_only_what_trains(model: UniImage, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "export")
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"ladder", "denoiser"}
    trained = sum(p.numel() for part in (model.ladder, model.denoiser) for p in part.parameters())
    assert sum(t.numel() for name, t in tensors.items()) == trained


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
def test_tensors_that_don_t_fit_are_refused_by_name(model: UniImage, tmp_path: Path, change: str) -> None:
    model.save_pretrained(tmp_path / "export")
    file = tmp_path / "export" / "model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["ladder.queries"]
    elif change == "unexpected":
        tensors["ladder.extra"] = torch.zeros(1)
    else:
        tensors["ladder.queries"] = torch.zeros(3, 96)
    save_file(tensors, file)
    name = "ladder.extra" if change == "unexpected" else "ladder.queries"
    with pytest.raises(ValueError, match=re.escape(name)):
        UniImage.from_pretrained(tmp_path / "export")


def test_other_frozen_parts_are_refused_by_name(model: UniImage, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "export", standalone=True)
    file = tmp_path / "export" / "mllm" / "model.safetensors"
    tensors = load_file(file)
    name = next(k for k in tensors if "q_proj.weight" in k)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="another mllm"):
        UniImage.from_pretrained(tmp_path / "export")


def test_what_isn_t_an_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not an exported model"):
        UniImagePipeline.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="format must be"):
        UniImagePipeline.from_pretrained(tmp_path)


def test_folders_load_the_weights_that_were_saved(in_world: Path) -> None:
    """The real loading code on the real formats: what the libraries saved is what we hold."""
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = load_small_model(in_world)
    backbones = in_world / "backbones"
    load_all_parts(model)
    pairs = [
        (model.mllm.model, Qwen2_5_VLForConditionalGeneration.from_pretrained(backbones / "mllm")),
        (model.denoiser.transformer, SanaTransformer2DModel.from_pretrained(backbones / "denoiser" / "transformer")),
        (model.autoencoder.model, AutoencoderDC.from_pretrained(backbones / "denoiser" / "vae")),
    ]
    for ours, saved in pairs:
        state = saved.state_dict()
        assert ours.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


def test_the_seed_decides_the_ladder(in_world: Path) -> None:
    states = [load_small_model(in_world, f"model.seed={s}").ladder.connector.state_dict() for s in (1, 1, 2)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["0.weight"], states[2]["0.weight"])


def build(*overrides: str) -> UniImage:
    """The model that train.py builds with these overrides."""
    return UniImage.from_config(instantiate(compose_config("train", "run_dir=.", *overrides).model))


def test_queries_start_from_their_phrases_or_from_noise(in_world: Path) -> None:
    model = build()
    embeddings, tokenizer = model.mllm.model.get_input_embeddings(), model.prompt.tokenizer
    for query, phrase in zip(model.ladder.queries, ("top left", "top center", "top right"), strict=False):
        ids = tokenizer(f" {phrase}")["input_ids"]
        torch.testing.assert_close(query, embeddings(torch.tensor(ids)).sum(0))
    noise = build("model.query_phrases=null").ladder.queries
    assert noise.std().item() == pytest.approx(0.02, rel=0.2)
    with pytest.raises((ValueError, InstantiationException), match="needs a word"):
        build("model.num_queries=1", "model.query_phrases=[' ']")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["taps=explicit", "taps.layers=[1,2]"], ["2 taps", "4 denoiser blocks"]),
        (["taps=explicit", "taps.layers=[1,2,3,99]"], ["tap index 99", "6 layers"]),
        (["model.dtype=float8"], ["model.dtype", "float8", "bfloat16"]),
        (["model.num_queries=0"], ["model.num_queries", "0"]),
        (["model.query_phrases=[one,two]"], ["2 phrases", "model.num_queries=9"]),
        (["model.mllm=/nowhere"], ["model.mllm=/nowhere", "local folder"]),
        (["model.denoiser=owner/absent"], ["model.denoiser=owner/absent", "local folder", "hub"]),
    ],
)
def test_bad_models_are_refused_before_weights_are_read(
    in_world: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], words: list[str]
) -> None:
    from transformers import Qwen2_5_VLModel

    monkeypatch.setattr(Qwen2_5_VLModel, "from_pretrained", lambda *_, **__: pytest.fail("read"))
    with pytest.raises((ValueError, InstantiationException)) as error:
        load_small_model(in_world, *overrides)
    assert all(word in str(error.value) for word in words), str(error.value)

"""A model's options: one home for YAML, checkpoint and export."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tbac.models import UniImage
from tbac.models.config import ArchitectureConfig, LadderConfig, ModelConfig
from tbac.models.export import read_export
from tbac.models.saved import FACTS, read_saved_model
from tbac.models.taps import last_n, learned_mix
from tbac.training.checkpoints import describe_model
from tests.helpers.configs import ROOT
from tests.helpers.worlds import load_small_model

FIELDS = {f.name for f in fields(ModelConfig)}
CONFIG = ModelConfig(mllm="owner/mllm", denoiser="owner/denoiser", image_pixels=576, taps=last_n(6, 4))


def keys_of(file: str) -> set[str]:
    """The top-level keys of a YAML that aren't Hydra's."""
    values = yaml.safe_load((ROOT / "conf" / file).read_text())
    return {key for key in values if not key.startswith("_") and key != "defaults"}


def test_yaml_checkpoint_and_export_hold_the_same_keys(in_world: Path) -> None:
    model = load_small_model(in_world)
    model.save_pretrained("out")
    exported = json.loads(Path("out/config.json").read_text())
    assert keys_of("model/base/options.yaml") == FIELDS
    assert set(exported) - {"format", "tbac_version", "frozen_digests"} == FIELDS
    kept = describe_model(model)["config"]["model"]
    assert set(kept) == FIELDS
    places = ("mllm", "denoiser")  # an export's are absolute
    assert {k: v for k, v in kept.items() if k not in places} == {k: exported[k] for k in FIELDS - set(places)}
    assert keys_of("ladder/base/options.yaml") <= set(kept["ladder"]) == {f.name for f in fields(LadderConfig)}


def test_an_option_stands_in_one_yaml_besides_presets() -> None:
    what_it_is_made_of = {"mllm", "denoiser", "image_pixels", "num_queries", "query_phrases", "dtype", "random_init"}
    for file in (ROOT / "conf" / "model").glob("*.yaml"):
        assert keys_of(f"model/{file.name}") <= what_it_is_made_of | {"architecture"}, file
    for file in (ROOT / "conf" / "ladder").glob("*.yaml"):
        own = {"num_layers", "num_heads"} if file.stem == "transformer" else set()
        assert keys_of(f"ladder/{file.name}") == {"connector"} | own


def test_plain_values_and_back() -> None:
    config = replace(
        CONFIG,
        taps=learned_mix(6, 4),
        ladder=LadderConfig("transformer", num_layers=1, num_heads=2, query_std=0.5),
        num_queries=2,
        query_phrases=("left", "right"),
        quantization="nf4",
        architecture=ArchitectureConfig(
            transformer={"num_layers": 4}, scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler"}
        ),
    )
    values = json.loads(json.dumps(config.to_dict()))
    again = ModelConfig.from_dict(values, "x")
    assert again.to_dict() == values
    assert replace(again, query_phrases=("left", "right")) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mllm": None}, "model.mllm must be a text, got None"),
        ({"denoiser": ""}, "model.denoiser must be a text, got ''"),
        ({"image_pixels": 0}, "model.image_pixels must be at least 1, a whole number; got 0"),
        ({"image_pixels": "576"}, "model.image_pixels must be at least 1, a whole number; got '576'"),
        ({"num_queries": True}, "model.num_queries must be at least 1"),
        ({"num_queries": 2.0}, "model.num_queries must be at least 1"),
        ({"max_text_tokens": -1}, "model.max_text_tokens must be at least 1"),
        ({"seed": -1}, "model.seed must be at least 0"),
        ({"dtype": "float8"}, "model.dtype must be one of float32, bfloat16, float16; got 'float8'"),
        ({"quantization": "int4"}, "model.quantization must be null, nf4 or int8; got 'int4'"),
        ({"spell_words": "yes"}, "model.spell_words must be true or false, got 'yes'"),
        ({"reference_latents": 1}, "model.reference_latents must be true or false, got 1"),
        ({"compile": None}, "model.compile must be true or false, got None"),
        ({"prompt_embeddings": 3}, "model.prompt_embeddings must be a text, got 3"),
        ({"query_phrases": ["one"]}, "model.query_phrases has 1 phrases for model.num_queries=64"),
        ({"query_phrases": "one"}, "model.query_phrases must be a list of texts or null, got 'one'"),
        ({"taps": "last_n"}, "model.taps must be a tap rule, such as those of conf/taps/; got 'last_n'"),
        ({"ladder": {"width": 3}}, "ladder has the unknown key 'width'; it may have connector, num_layers"),
        ({"ladder": [1]}, r"ladder must be a mapping, got \[1\]"),
        ({"ladder": {"num_heads": 0}}, "ladder.num_heads must be at least 1"),
        ({"ladder": {"query_std": -1}}, "ladder.query_std must be between 0 and 1e"),
        ({"ladder": {"connector": 3}}, "ladder.connector must be one of shared_mlp, per_tap_mlp, transformer; got 3"),
        ({"architecture": {"vae": {}}}, "model.architecture has the unknown key 'vae'"),
        ({"architecture": {"mllm": 3}}, "model.architecture.mllm must be a mapping, got 3"),
        ({"architecture": {"scheduler": {}}}, "the scheduler config names the class None; it must be one of"),
    ],
)
def test_what_isn_t_accepted_is_named_with_its_value(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: values.update(wdith=3), r"x\.ckpt: model has the unknown key 'wdith'"),
        (lambda values: values.pop("taps"), r"x\.ckpt: model lacks the key 'taps'"),
        (lambda values: values.update(num_queries=0), r"x\.ckpt: model\.num_queries must be at least 1"),
        (lambda values: values["taps"].pop("mixed"), r"x\.ckpt: taps must hold layers"),
        (lambda values: values["ladder"].update(layers=3), r"x\.ckpt: ladder has the unknown key 'layers'"),
    ],
)
def test_a_file_that_holds_anything_else_is_named(change: Callable[[dict], Any], words: str) -> None:
    values = CONFIG.to_dict()
    change(values)
    with pytest.raises(ValueError, match=words):
        ModelConfig.from_dict(values, "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt"):
        ModelConfig.from_dict([values], "x.ckpt")


def test_an_unknown_argument_of_a_part_is_named(in_world: Path) -> None:
    load_small_model(in_world).save_pretrained("out")
    config = json.loads(Path("out/config.json").read_text())
    config["architecture"]["transformer"]["depth"] = 3
    Path("out/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.architecture\.transformer has the unknown key 'depth'"):
        UniImage.from_pretrained("out")


def test_what_a_model_does_otherwise_is_listed() -> None:
    changed = replace(CONFIG, mllm="elsewhere", dtype="bfloat16", ladder=LadderConfig(prompt_context=True))
    assert changed.list_changes_since(CONFIG) == ["ladder.prompt_context False -> True"]
    assert changed.list_additions() == {"ladder.prompt_context": True}
    assert CONFIG.list_additions() == {}


def as_before_version_2(config: ModelConfig) -> dict[str, Any]:
    """The facts that a checkpoint held when its config was still that of the YAML."""
    values = config.to_dict()
    plan = {key: value for key, value in values["taps"].items() if key != "num_blocks"}
    rule = {"_target_": "tbac.models.taps.TapRule", "_convert_": "all", "rule": "last_n", "layers": None}
    rule |= {"layer": None, "assignment": None}
    del values["system_prompt"]
    model = values | {"_target_": "tbac.models.loading.load_model", "_convert_": "all", "taps": rule}
    model["ladder"] = {"connector": "shared_mlp", "query_std": 0.02, "prompt_context": False}
    return {"frozen": {}, "taps": plan, "options": {}, "sources": {}, "config": {"model": model}}


@pytest.mark.parametrize("rule", [last_n, partial(learned_mix, layers=(1, 4, 6))])
def test_checkpoints_of_before_are_read(rule: Callable[..., Any]) -> None:
    config = replace(CONFIG, taps=rule(6, 4), architecture=None)
    state = {"ladder.mix_logits": torch.zeros(4, 3)} if config.taps.mixed else {}  # type: ignore[union-attr]
    saved = read_saved_model({FACTS: as_before_version_2(config), "state_dict": state}, "x.ckpt")
    assert saved.config == config


def test_a_checkpoint_of_before_with_another_rule_is_refused() -> None:
    facts = as_before_version_2(CONFIG)
    facts["config"]["model"]["taps"]["_target_"] = "os.system"
    with pytest.raises(ValueError, match=r"x\.ckpt: model\.taps names _target_='os\.system'"):
        read_saved_model({FACTS: facts, "state_dict": {}}, "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt doesn't say what its model is made of"):
        read_saved_model({FACTS: {"frozen": {}}, "state_dict": {}}, "x.ckpt")


def test_exports_of_format_1_are_read(in_world: Path) -> None:
    model = load_small_model(in_world, "model.reference_latents=true", "taps=uniform")
    model.save_pretrained("out")
    today = read_export(Path("out"))
    new = json.loads(Path("out/config.json").read_text())
    old = {name: new[name] for name in ("num_queries", "image_pixels", "max_text_tokens", "system_prompt", "taps")}
    old |= {name: new[name] for name in ("spell_words", "tbac_version", "frozen_digests")}
    old |= {
        "format": "tbac-uniimage-1",
        "ladder": {"connector": "shared_mlp", "query_std": 0.02, "prompt_context": False},
        "mllm": {"source": new["mllm"]},
        "denoiser": {
            "source": new["denoiser"],
            "config": new["architecture"]["transformer"],
            "references": True,
        },
        "scheduler": new["architecture"]["scheduler"],
    }
    Path("out/config.json").write_text(json.dumps(old))
    before = read_export(Path("out"))
    # How training began wasn't kept.
    assert replace(before.config, query_phrases=today.config.query_phrases) == today.config
    assert before.frozen_digests == today.frozen_digests

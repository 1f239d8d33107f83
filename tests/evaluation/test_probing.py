"""Probes: captions with labels, what is read from a model, and what is chosen by it."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.shapes.captions import draw_captions
from data_prep.words.captions import KIND_OF
from data_prep.words.captions import draw_captions as draw_word_captions
from data_prep.words.lexicon import read_lexicon
from tbac.evaluation.captions import LabelledCaption, choose_split, list_concepts, read_table
from tbac.evaluation.probing import Probe, Task, make_tasks, read_states, recommend
from tbac.models import UniImage
from tbac.models.taps import bundle, final, last_n, learned_mix, resolve_taps

COLORS, SHAPES = ("red", "green", "blue"), ("circle", "square")


def draw_world(count: int = 360) -> tuple[np.ndarray, list[LabelledCaption]]:
    """States of 7 layers of 16 channels in noise: layer 2 holds the colour, layer 5 the shape, the last one nothing.

    Layer 4 holds the colour too, but only of captions whose words have been seen.
    """
    rng = np.random.default_rng(0)
    states = rng.normal(size=(7, count, 16)).astype(np.float32)
    captions = []
    for index in range(count):
        color, shape = rng.integers(3), rng.integers(2)
        split = ("train", "seen", "unseen")[index % 3]
        states[2, index, color] += 6
        states[5, index, shape] += 6
        states[4, index, color] += 6 * (split != "unseen")
        captions.append(LabelledCaption(f"caption {index}", {"color": COLORS[color], "shape": SHAPES[shape]}, split))
    return states, captions


def test_what_is_planted_in_a_layer_is_found_there() -> None:
    states, captions = draw_world()
    found = Probe(states, make_tasks(captions)).measure_layers()
    assert set(found) == {"seen", "unseen"}
    for concept, layer, chance in (("color", 2, 1 / 3), ("shape", 5, 1 / 2)):
        accuracies = found["unseen"][concept]
        assert accuracies[layer] > 0.97
        others = [value for index, value in enumerate(accuracies) if index != layer]
        assert max(abs(value - chance) for value in others) < 0.2
    assert found["seen"]["color"][4] > 0.97


def test_layers_are_chosen_that_complete_each_other_and_no_more() -> None:
    states, captions = draw_world()
    probe = Probe(states, make_tasks(captions))
    assert probe.choose_layers() == [2, 5]
    assert probe.measure_mean([2, 5], half=1) > 0.97
    assert len(probe.choose_layers(most=1)) == 1
    only_color = [LabelledCaption(c.text, {"color": c.labels["color"]}, c.split) for c in captions]
    assert Probe(states, make_tasks(only_color)).choose_layers() == [2]


def test_a_choice_is_made_and_measured_by_different_captions() -> None:
    captions = [LabelledCaption(str(i), {"c": str(i % 2)}, "train" if i < 8 else "seen") for i in range(24)]
    (task,) = make_tasks(captions)
    predicted = task.labels.copy()
    predicted[task.tests["seen"][0::2]] = "wrong"
    assert [task.measure(predicted, half)["seen"] for half in (0, 1, None)] == [0.0, 1.0, 0.5]


def test_every_class_counts_the_same() -> None:
    labels = ["red"] * 90 + ["green"] * 10
    captions = [LabelledCaption(f"{i}", {"color": c}, "train" if i % 2 else "seen") for i, c in enumerate(labels)]
    (task,) = make_tasks(captions)
    assert task.measure(task.predict(np.zeros((100, 3))))["seen"] == 0.5  # one class is always guessed


def test_a_forecast_is_the_mean_over_what_blocks_read() -> None:
    states, captions = draw_world()
    probe = Probe(states, make_tasks(captions))
    listed = resolve_taps(last_n, 6, 4)
    assert probe.forecast(listed) == pytest.approx(np.mean([probe.measure_mean([k], half=1) for k in (2, 3, 4, 5)]))
    joined = resolve_taps(partial(bundle, layers=[2, 5], blocks=[0]), 6, 4)
    expected = [probe.measure_mean([2, 5], half=1), *[probe.measure_mean([6], half=1)] * 3]
    assert probe.forecast(joined) == pytest.approx(np.mean(expected))
    mixed = resolve_taps(partial(learned_mix, layers=[2, 5]), 6, 4)
    mean = Probe(states[[2, 5]].mean(axis=0)[None], make_tasks(captions)).measure_mean([0], half=1)
    assert probe.forecast(mixed) == pytest.approx(mean)


def test_a_set_of_layers_is_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    states, captions = draw_world(90)
    fitted: list[tuple[int, ...]] = []
    plain = Task.predict
    monkeypatch.setattr(Task, "predict", lambda task, features: fitted.append(features.shape) or plain(task, features))
    probe = Probe(states, make_tasks(captions))
    probe.measure_layers()
    assert len(fitted) == 2 * 7
    probe.forecast(resolve_taps(last_n, 6, 4))
    assert len(fitted) == 2 * 7


@pytest.mark.parametrize(
    ("layers", "overrides"),
    [
        ([6], "taps=final"),
        ([3], "taps=single taps.layer=3"),
        ([2, 5], "taps=bundle 'taps.layers=[2,5]' ladder.tap_norm=rms"),
    ],
)
def test_the_rule_that_is_recommended_reads_these_layers(layers: list[int], overrides: str) -> None:
    assert recommend(layers, 6) == overrides


def test_states_are_those_of_the_library_s_own_pass(model: UniImage) -> None:
    texts = ["a red circle", "three green squares and a letter L at the top left on a black background", "x"]
    found = read_states(model, texts, batch_size=2)
    body = model.mllm.body
    for row, text in enumerate(texts):
        inputs = model.prompt([text])
        shared, length = len(inputs["shared_ids"]), inputs["input_ids"].shape[1]
        embedded = torch.cat([model.mllm.embed(inputs), model.ladder.queries[None]], dim=1)
        positions = torch.arange(embedded.shape[1]).expand(3, 1, -1)
        with torch.no_grad():
            states = body.language_model(
                inputs_embeds=embedded, position_ids=positions, use_cache=False, output_hidden_states=True
            ).hidden_states
        assert len(states) == len(found["queries"]) == model.mllm.num_layers + 1
        for layer, state in enumerate(states):
            normed = state[0] / (state[0].square().mean(-1, keepdim=True) + 1e-6).sqrt()
            for source, part in (("prompt", normed[shared:length]), ("queries", normed[length:])):
                own = torch.from_numpy(found[source][layer, row])
                torch.testing.assert_close(own, part.mean(0), rtol=1e-3, atol=1e-4)


def test_rules_of_a_model_are_told_apart(model: UniImage) -> None:
    captions = draw_captions(0, 300)
    states = read_states(model, [caption.text for caption in captions])
    probe = Probe(states["prompt"], make_tasks(captions))
    assert all(0.2 < probe.forecast(resolve_taps(rule, 6, 4)) <= 1 for rule in (final, last_n))


def test_captions_of_the_shapes_world_can_be_probed() -> None:
    captions = draw_captions(0, 600)
    assert captions == draw_captions(0, 600) != draw_captions(1, 600)
    assert list_concepts(captions)
    assert len({c.text for c in captions}) == len(captions)
    for caption in captions:
        assert caption.labels.get("color", "") in caption.text
    # A combination that is tested as unseen is nowhere learnt from.
    alone = [c for c in captions if "shape" in c.labels]
    pairs = {
        split: {(c.labels["shape"], c.labels["color"]) for c in alone if c.split == split}
        for split in ("train", "unseen")
    }
    assert pairs["unseen"]
    assert not pairs["train"] & pairs["unseen"]


def test_captions_of_the_world_of_words_are_tested_in_words_seen_and_unseen() -> None:
    captions, lexicon = draw_word_captions(0, 800), read_lexicon()
    assert captions == draw_word_captions(0, 800) != draw_word_captions(1, 800)
    assert list_concepts(captions)
    assert {c.split for c in captions} == {"train", "seen", "unseen"}
    held_out = {kind: [w for by in lexicon.words[kind].values() for w in by["held_out"]] for kind in KIND_OF.values()}
    held_out["shapes"] += [lexicon.plurals[word] for word in held_out["shapes"]]
    for caption in captions:
        spoken = {kind for kind, words in held_out.items() if any(f" {word}" in f" {caption.text}" for word in words)}
        if caption.split == "unseen":
            (concept,) = caption.labels
            assert KIND_OF[concept] in spoken, caption
        else:
            assert not spoken & {"colors", "shapes"}, caption  # such as "ball" in no other word


def write(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def test_a_table_of_your_own_is_read(tmp_path: Path) -> None:
    csv = write(
        tmp_path / "a.csv", 'caption,split,animal,where\n"a cat, asleep",train,cat,\na dog outside,unseen,dog,outside\n'
    )
    lines = write(
        tmp_path / "a.jsonl",
        '{"caption": "a cat, asleep", "split": "train", "animal": "cat"}\n\n'
        '{"caption": "a dog outside", "split": "unseen", "animal": "dog", "where": "outside"}\n',
    )
    expected = [
        LabelledCaption("a cat, asleep", {"animal": "cat"}),
        LabelledCaption("a dog outside", {"animal": "dog", "where": "outside"}, "unseen"),
    ]
    assert read_table(csv) == read_table(lines) == expected
    without = read_table(
        write(tmp_path / "b.csv", "caption,n\n" + "".join(f"caption {i},{i % 2}\n" for i in range(400)))
    )
    shares = [sum(c.split == split for c in without) / 400 for split in ("train", "seen")]
    assert shares == pytest.approx([0.7, 0.3], abs=0.08)
    assert all(c.split == choose_split(c.text) for c in without)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "text,color\na red thing,red\n", "row 1: caption must be a text"),
        ("a.csv", "caption,color\n", "has no rows"),
        ("a.csv", "caption,split,color\na red thing,test,red\n", "row 1: split must be one of train, seen, unseen"),
        ("a.jsonl", '{"caption": 3}\n', "row 1: caption must be a text, got 3"),
        ("a.jsonl", '{"caption": " "}\n', "row 1: a caption must have words"),
        ("a.jsonl", "[1]\n", "a.jsonl:1"),
        ("a.jsonl", "{\n", "a.jsonl:1"),
        ("missing.csv", None, "missing.csv"),
    ],
)
def test_a_table_that_can_t_be_used_is_named(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(ValueError, match=words):
        read_table(tmp_path / name)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("a", {}, "train")], "no caption has a label"),
        ([("a", {"c": "1"}, "train"), ("b", {"c": "1"}, "seen")], "c needs captions of at least two classes"),
        ([("a", {"c": "1"}, "train"), ("b", {"c": "2"}, "train")], "c needs captions .* some to test"),
        (
            [("a", {"c": "1"}, "train"), ("b", {"c": "2"}, "train"), ("d", {"c": "3"}, "seen")],
            r"classes \['3'\] are tested",
        ),
    ],
)
def test_captions_that_can_t_be_probed_are_named(rows: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list_concepts([LabelledCaption(*row) for row in rows])


def test_chance_is_a_class_of_many() -> None:
    states, captions = draw_world()
    noise = np.random.default_rng(1).normal(size=states.shape[1:])
    assert Probe(noise[None], make_tasks(captions)).measure_mean([0]) == pytest.approx((1 / 3 + 1 / 2) / 2, abs=0.15)
    assert json.dumps(Probe(states, make_tasks(captions)).measure_layers())

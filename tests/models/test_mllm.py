"""The split pass of the frozen MLLM against the plain one: whole sequence, every hidden state, gradient through all."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextStreamer

from tbac.models import UniImage
from tbac.models.vision import pad_vision_mlps
from tbac.types import Condition
from tests.helpers.pictures import make_prompt_cases
from tests.helpers.worlds import load_small_model


def plain_taps(model: UniImage, inputs: dict, queries: Tensor) -> Tensor:
    """All hidden states of the queries by the library's own forward: (state, batch, query, hidden).

    The queries follow each prompt's real tokens, and the padding comes last.
    """
    mllm = model.mllm.load_full_model()
    ids, mask, count = inputs["input_ids"], inputs["attention_mask"], len(queries)
    lengths = mask.sum(1)
    width = ids.shape[1] + count
    vision_end = mllm.config.vision_end_token_id
    tokens = torch.full((len(ids), width), vision_end)
    tokens[:, : ids.shape[1]] = torch.where(mask.bool(), ids, vision_end)
    whole_mask = (torch.arange(width) < (lengths + count)[:, None]).long()
    kinds = (tokens == mllm.config.image_token_id).int()
    grids = inputs.get("image_grid_thw")
    if grids is None:
        positions = (whole_mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
    else:
        positions = mllm.model.get_rope_index(tokens, kinds, grids, attention_mask=whole_mask)[0]
    places = (torch.arange(width) >= lengths[:, None]) & whole_mask.bool()
    embeddings = mllm.get_input_embeddings()(tokens)
    if grids is not None:
        features = torch.cat(list(mllm.model.get_image_features(inputs["pixel_values"], grids).pooler_output))
        embeddings = embeddings.masked_scatter((kinds == 1).unsqueeze(-1), features)
    embeddings = embeddings.masked_scatter(places.unsqueeze(-1), queries.repeat(len(ids), 1))
    output = mllm.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=whole_mask,
        position_ids=positions,
        output_hidden_states=True,
        use_cache=False,
    )
    hidden = list(output.hidden_states)
    return torch.stack([state[places].view(len(ids), count, -1) for state in hidden])


@pytest.mark.parametrize("case", ["text", "one_image", "several_images", "mixed"])
def test_taps_loss_and_gradients_equal_the_plain_pass(model: UniImage, case: str) -> None:
    texts, images = make_prompt_cases()[case]
    inputs = model.prompt(texts, images)
    torch.manual_seed(5)
    latents = torch.randn(2, len(texts), 8, 6, 6)
    sigma = torch.rand(len(texts))

    def loss_of(taps: Tensor) -> Tensor:
        condition = model.ladder(taps)
        predicted = model.denoiser(latents[0], 1000 * sigma, Condition(condition))
        return (predicted - latents[1]).square().mean()

    trained = {**dict(model.ladder.named_parameters()), **dict(model.denoiser.named_parameters())}
    results = []
    for plain in (True, False):
        model.zero_grad()
        if plain:
            taps = plain_taps(model, inputs, model.ladder.queries)[list(model.ladder.plan.layers)]
        else:
            prefix = model.mllm.read_prefix(inputs, model.ladder.plan.deepest)
            taps = model.mllm.read_queries(model.ladder.queries, prefix, model.ladder.plan.layers)
        loss = loss_of(taps)
        loss.backward()
        results.append((taps, loss, {k: p.grad.clone() for k, p in trained.items() if p.grad is not None}))
    (taps, loss, gradients), (our_taps, our_loss, our_gradients) = results
    torch.testing.assert_close(our_taps, taps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == our_gradients.keys()
    assert gradients["queries"].abs().max() > 1e-6
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            our_gradients[name], gradient, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", ["text", "mixed"])
def test_exact_in_float64(model: UniImage, case: str) -> None:
    texts, images = make_prompt_cases()[case]
    inputs = model.prompt(texts, images)
    model.mllm.load_full_model()  # its last layers too
    mllm = model.mllm.double()
    inputs["pixel_values"] = inputs["pixel_values"].double() if "pixel_values" in inputs else None
    queries = model.ladder.queries.detach().double()
    layers = list(range(mllm.num_layers + 1))
    ours = mllm.read_queries(queries, mllm.read_prefix(inputs, mllm.num_layers), layers)
    # Rotary tables stay in float32 in the library, hence not 1e-15.
    torch.testing.assert_close(ours, plain_taps(model, inputs, queries), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["text", "mixed"])
def test_mixed_precision_stays_near_the_plain_pass(model: UniImage, case: str) -> None:
    inputs = model.prompt(*make_prompt_cases()[case])
    plain = model.encode_condition(inputs).states
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.encode_condition(inputs).states
    mixed.float().sum().backward()
    assert torch.nn.functional.cosine_similarity(plain, mixed.float(), dim=-1).min() > 0.99
    assert model.ladder.queries.grad is not None


@pytest.mark.parametrize("case", ["text", "mixed"])
@pytest.mark.parametrize("way", ["checkpointing", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_checkpointing_and_compiling_change_nothing(model: UniImage, case: str, way: str) -> None:
    """The library drops its cache under checkpointing in training mode; here neither mode matters."""
    model.train()
    inputs = model.prompt(*make_prompt_cases()[case])
    results = []
    for changed in (False, True):
        if changed and way != "checkpointing":
            model.mllm.compile_layers(dynamic=True, backend=way)
        model.set_checkpointing(queries=changed and way == "checkpointing")
        model.zero_grad()
        states = model.encode_condition(inputs).states
        states.square().mean().backward()
        results.append((states.detach(), model.ladder.queries.grad.clone()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "grids",
    [
        [[1, 8, 8]],  # one window by whole ones
        [[1, 4, 6], [1, 4, 6]],
        [[1, 10, 14], [1, 2, 2], [1, 18, 4]],  # windows and images of all lengths
        [[2, 6, 10], [1, 8, 8]],  # two frames
    ],
)
def test_windows_in_one_batch_give_the_library_s_features(model: UniImage, grids: list[list[int]]) -> None:
    visual, grid = model.mllm.body.visual.double(), torch.tensor(grids)
    config = visual.config
    channels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(int(grid.prod(-1).sum()), channels, dtype=torch.float64)
    expected = visual(pixels, grid_thw=grid).pooler_output
    torch.testing.assert_close(model.mllm.encode_images(pixels, grid), expected, rtol=1e-12, atol=1e-12)


def test_checkpointing_runs_the_query_pass_twice_and_the_prompt_once(model: UniImage) -> None:
    ran = []
    layers = model.mllm.body.language_model.layers
    layers[0].self_attn.q_proj.register_forward_hook(lambda _, args, out: ran.append(args[0].shape[1]))
    model.set_checkpointing(queries=True)
    inputs = model.prompt(["a red circle"])
    shared = len(inputs["shared_ids"])
    own = inputs["input_ids"].shape[1] - shared
    for passes in ([shared, own, 9, 9], [own, 9, 9]):  # what all prompts begin with runs once for good
        ran.clear()
        model.encode_condition(inputs).states.sum().backward()
        assert ran == passes


@pytest.mark.parametrize("case", ["text", "mixed"])
def test_inputs_padded_on_the_left_are_read_alike(model: UniImage, case: str) -> None:
    texts, images = make_prompt_cases()[case]
    right, left = (
        model.encode_condition(model.prompt(texts, images, padding_side=s)).states for s in ("right", "left")
    )
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_padding_and_company_change_nothing(model: UniImage) -> None:
    texts, images = make_prompt_cases()["mixed"]
    together = model.encode_condition(model.prompt(texts, images)).states
    for row, (text, group) in enumerate(zip(texts, images, strict=True)):
        alone = model.encode_condition(model.prompt([text], [group])).states
        torch.testing.assert_close(together[:, row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_nothing_above_the_deepest_tap_runs(in_world, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_small_model(in_world, "taps=explicit", "taps.layers=[1,2,2,1]")
    ran = []
    for index, layer in enumerate(model.mllm.body.language_model.layers):
        layer.self_attn.k_proj.register_forward_hook(lambda *_, i=index: ran.append(i))
    model.encode_condition(model.prompt(["a red circle"]))
    assert ran == [0, 1, 0, 1, 0, 1]  # what all prompts begin with, prompt, queries


def test_the_constant_beginning_changes_nothing_and_outlives_inference_mode(model: UniImage) -> None:
    inputs = model.prompt(*make_prompt_cases()["mixed"])
    whole = {k: v for k, v in inputs.items() if k != "shared_ids"}
    with torch.inference_mode():
        model.encode_condition(inputs)
    states = model.encode_condition(inputs).states
    torch.testing.assert_close(states, model.encode_condition(whole).states, rtol=1e-4, atol=1e-5)
    states.sum().backward()
    assert model.ladder.queries.grad is not None


def test_only_the_queries_carry_gradient(model: UniImage) -> None:
    model.encode_condition(model.prompt(["a red circle"])).states.sum().backward()
    assert model.ladder.queries.grad is not None
    assert all(p.grad is None and not p.requires_grad for p in model.mllm.parameters())


def test_training_mode_never_reaches_the_frozen_parts(model: UniImage) -> None:
    model.train()
    assert not any(m.training for part in (model.mllm, model.autoencoder) for m in part.modules())


def test_queries_are_a_parameter_of_their_own(model: UniImage) -> None:
    assert model.ladder.queries.shape == (9, 96)
    vocabulary = model.mllm.model.get_input_embeddings().weight.shape[0]
    assert vocabulary == len(model.prompt.tokenizer)


def test_tap_0_is_the_queries_themselves(model: UniImage) -> None:
    prefix = model.mllm.read_prefix(model.prompt(["a red circle", "two squares"]), 0)
    (states,) = model.mllm.read_queries(model.ladder.queries, prefix, (0,))
    assert torch.equal(states, model.ladder.queries.expand(2, -1, -1))


def test_a_prefix_can_be_read_twice(model: UniImage) -> None:
    prefix = model.mllm.read_prefix(model.prompt(["a red circle"]), model.ladder.plan.deepest)
    first, second = (model.mllm.read_queries(model.ladder.queries, prefix, (2, 5)) for _ in range(2))
    assert torch.equal(first, second)


def test_answers_equal_the_library_s_own_generation(model: UniImage) -> None:
    texts, images = make_prompt_cases()["mixed"]
    untouched = copy.deepcopy(model.mllm.load_full_model())
    inputs = model.prompt(texts, images, system="You are a helpful assistant.", ending="", padding_side="left")
    kinds = (inputs["input_ids"] == untouched.config.image_token_id).int()
    expected = untouched.generate(**inputs, mm_token_type_ids=kinds, max_new_tokens=5, do_sample=False)
    expected = expected[:, inputs["input_ids"].shape[1] :]
    model.encode_condition(model.prompt(texts, images))  # generation and conditioning may alternate
    tokenizer = model.prompt.tokenizer
    assert model.answer(texts, images, 5) == [
        t.strip() for t in tokenizer.batch_decode(expected, skip_special_tokens=True)
    ]


def generate_by_the_library(model: UniImage, text: str, **options: Any) -> str:
    """Answer as transformers alone would, from a copy of the model that nothing else has used."""
    untouched = copy.deepcopy(model.mllm.load_full_model())
    inputs = model.prompt([text], None, system="You are a helpful assistant.", ending="", padding_side="left")
    kinds = torch.zeros_like(inputs["input_ids"], dtype=torch.int)
    tokens = untouched.generate(**inputs, mm_token_type_ids=kinds, max_new_tokens=8, **options)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return model.prompt.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0}, {"top_k": 5}, {"top_p": 0.5, "repetition_penalty": 1.5}])
def test_drawn_answers_equal_the_library_s_own_and_leave_its_random_numbers(model: UniImage, options: dict) -> None:
    torch.manual_seed(7)
    expected = generate_by_the_library(model, "what is it?", do_sample=True, **options)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    drawn = [model.answer(["what is it?"], None, 8, do_sample=True, seed=7, **options)[0] for _ in range(2)]
    assert drawn == [expected, expected]
    assert torch.equal(torch.get_rng_state(), before)
    assert model.answer(["what is it?"], None, 8, do_sample=True, seed=8, **options) != drawn[:1]


def test_a_streamed_answer_is_the_answer(model: UniImage, capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(model.prompt.tokenizer, skip_prompt=True, skip_special_tokens=True)
    (answer,) = model.answer(["what is it?"], None, 8, streamer)
    assert capsys.readouterr().out.strip() == answer
    with pytest.raises(ValueError, match="a streamer shows one answer, and there are 2 questions"):
        model.answer(["what is it?", "how many?"], None, 8, streamer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.5}, "temperature=0.5 is for answers that are drawn; give do_sample=True"),
        ({"seed": 0}, "seed=0 is for answers"),
        ({"do_sample": True, "temperature": 0}, "temperature must be a number above 0, got 0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature must be"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be at most 1, got 1.5"),
        ({"do_sample": True, "top_k": True}, "top_k must be a whole number of at least 1, got True"),
        ({"do_sample": 1}, "do_sample must be true or false, got 1"),
        ({"do_sample": True, "seed": -1}, "seed must be a whole number"),
        ({"repetition_penalty": "2"}, "repetition_penalty must be a number above 0, got '2'"),
    ],
)
def test_options_of_an_answer_are_named(model: UniImage, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model.answer(["what is it?"], None, 8, **options)


def test_answering_one_by_one_equals_answering_together(model: UniImage) -> None:
    texts, images = make_prompt_cases()["mixed"]
    alone = [model.answer([t], [i], 4)[0] for t, i in zip(texts, images, strict=True)]
    assert model.answer(texts, images, 4) == alone


@pytest.mark.parametrize("change", [{"use_sliding_window": True}, {"attention_dropout": 0.1}])
def test_a_model_that_can_t_be_split_is_refused(model: UniImage, change: dict) -> None:
    from tbac.models.mllm import FrozenMLLM

    for name, value in change.items():
        setattr(model.mllm.model.config.text_config, name, value)
    with pytest.raises(ValueError, match="sliding-window"):
        FrozenMLLM(model.mllm.model)


def test_vision_mlps_of_any_width_stay_the_same_when_widened(model: UniImage) -> None:
    visual, grid = model.mllm.body.visual, torch.tensor([[1, 4, 6]])
    config = copy.deepcopy(visual.config)
    config.intermediate_size = 45
    odd = type(visual)(config).double().requires_grad_(False)
    pixels = torch.randn(24, config.in_channels * config.temporal_patch_size * config.patch_size**2).double()
    expected = odd(pixels, grid_thw=grid).pooler_output
    pad_vision_mlps(odd)
    assert {block.mlp.gate_proj.weight.shape[0] for block in odd.blocks} == {48}
    torch.testing.assert_close(odd(pixels, grid_thw=grid).pooler_output, expected, rtol=1e-12, atol=1e-12)

"""What goes beyond the released model: references, the prompt as context, words spelled out. All are off by default."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tbac.models import UniImage
from tbac.models.prompt import PromptInputs, spell_quoted_words
from tbac.models.saved import FACTS, SavedModel, read_saved_model
from tbac.sampling import UniImagePipeline
from tbac.training.checkpoints import describe_model, load_weights
from tests.helpers.pictures import make_noise_image
from tests.helpers.worlds import load_small_model

ALL = ("model.reference_latents=true", "model.spell_words=true", "ladder.prompt_context=true")
TEXTS = ["a red circle", "", "three green squares and a letter L at the top left on a black background"]


@pytest.fixture
def referring(in_world: Path) -> UniImage:
    model = load_small_model(in_world, "model.reference_latents=true")
    assert model.denoiser.reference_embed is not None
    torch.nn.init.normal_(model.denoiser.reference_embed.weight, std=0.5)
    return model


def loss_gradients(model: UniImage, inputs: PromptInputs) -> dict[str, Tensor]:
    latents = torch.randn(len(inputs["input_ids"]), 8, 6, 6, generator=torch.Generator().manual_seed(5))
    model.predict_velocity(latents, torch.tensor([0.5]), model.encode_condition(inputs)).square().mean().backward()
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def test_all_are_off_by_default(model: UniImage) -> None:
    config = model.provenance.config
    assert not any((config.reference_latents, config.spell_words, config.ladder.prompt_context))
    condition = model.encode_condition(model.prompt(TEXTS, [[make_noise_image(0)], None, None]))
    assert condition.mask is None
    assert condition.reference is None


def test_references_start_out_changing_nothing(model: UniImage, in_world: Path) -> None:
    with_references = load_small_model(in_world, "model.reference_latents=true")
    images = [[make_noise_image(0)], None, [make_noise_image(1)]]
    latents = torch.randn(3, 8, 6, 6)
    made = [
        m.predict_velocity(latents, torch.tensor([0.3]), m.encode_condition(m.prompt(TEXTS, images)))
        for m in (model, with_references)
    ]
    assert torch.equal(*made)


def test_references_are_the_latents_of_the_first_image(referring: UniImage) -> None:
    picture = make_noise_image(1, (24, 24))
    condition = referring.encode_condition(
        referring.prompt(TEXTS, [[picture, make_noise_image(2)], None, [make_noise_image(3)]])
    )
    pixels = torch.tensor(list(picture.get_flattened_data())).view(24, 24, 3).permute(2, 0, 1)[None] / 127.5 - 1
    assert condition.reference is not None
    torch.testing.assert_close(condition.reference[:1], referring.autoencoder.encode(pixels))
    assert condition.reference[1].abs().max() == 0
    assert referring.encode_condition(referring.prompt(TEXTS)).reference is None


def test_references_reach_the_prediction_and_train(referring: UniImage) -> None:
    inputs = referring.prompt(TEXTS, [[make_noise_image(1)], None, [make_noise_image(2)]])
    condition = referring.encode_condition(inputs)
    latents = torch.randn(3, 8, 6, 6)
    made = referring.predict_velocity(latents, torch.tensor([0.5]), condition)
    condition.reference = None
    plain = referring.predict_velocity(latents, torch.tensor([0.5]), condition)
    changed = (made - plain).abs().amax((1, 2, 3))
    assert changed[0] > 1e-4
    assert changed[2] > 1e-4
    bias_only = referring.denoiser.reference_embed.bias  # type: ignore[union-attr]
    assert bias_only.abs().max() == 0
    assert changed[1] == 0
    assert loss_gradients(referring, inputs)["denoiser.reference_embed.weight"].abs().max() > 0


def test_every_guidance_branch_has_its_own_reference(referring: UniImage) -> None:
    pipe = UniImagePipeline(referring)
    noise = torch.randn(2, 8, 6, 6)
    options = {"num_inference_steps": 2, "latents": noise, "output_type": "latent"}
    images = [make_noise_image(1), make_noise_image(2)]
    together = pipe(TEXTS[:2], image=images, **options).images
    apart = pipe(TEXTS[:2], image=images, batch_branches=False, **options).images
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    one = pipe(TEXTS[:1], image=images[:1], **(options | {"latents": noise[:1]})).images
    torch.testing.assert_close(together[:1], one, rtol=1e-4, atol=1e-5)
    other = pipe(TEXTS[:1], image=[make_noise_image(3)], **(options | {"latents": noise[:1]})).images
    assert (other - one).abs().max() > 1e-3


def test_references_follow_the_size_of_the_picture(referring: UniImage) -> None:
    made = UniImagePipeline(referring)(
        "a circle", image=make_noise_image(1), height=16, width=32, num_inference_steps=1
    )
    assert made.images[0].size == (32, 16)


WAYS_OF_READING = [
    [],
    ["taps=bundle", "ladder.tap_norm=layer"],
    ["taps=learned_mix", "taps.layers=all", "ladder.tap_norm=rms", "ladder=per_tap_mlp"],
    ["taps=attend", "taps.blocks=[1,2]"],
]


@pytest.fixture(params=WAYS_OF_READING[:1], ids=lambda overrides: "_".join(overrides) or "as released")
def reading(in_world: Path, request: pytest.FixtureRequest) -> UniImage:
    return load_small_model(in_world, "ladder.prompt_context=true", *request.param)


@pytest.mark.parametrize("reading", WAYS_OF_READING, indirect=True, ids=lambda overrides: str(overrides))
@pytest.mark.parametrize("images", [None, [[make_noise_image(1)], None, [make_noise_image(2), make_noise_image(3)]]])
def test_the_prompts_states_are_those_of_the_whole_sequence(reading: UniImage, images: list | None) -> None:
    """Against the library's own forward pass of each prompt."""
    condition = reading.encode_condition(reading.prompt(TEXTS, images))
    queries = reading.ladder.queries.shape[0]
    reading.mllm.load_full_model()  # the library norms the last state of what it has
    assert condition.mask is not None
    for row, text in enumerate(TEXTS):
        inputs = reading.prompt([text], None if images is None else [images[row]])
        shared = len(inputs["shared_ids"])
        body = reading.mllm.body
        plain = body.language_model(
            inputs_embeds=reading.mllm.embed(inputs),
            position_ids=inputs["position_ids"],
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
        expected = reading.ladder(torch.stack([plain[i][:, shared:] for i in reading.ladder.plan.layers]))
        own = condition.states[:, row, queries:][:, condition.mask[row, queries:]]
        torch.testing.assert_close(own, expected[:, 0], rtol=1e-4, atol=1e-4)


def test_padding_of_the_prompt_is_never_read(reading: UniImage) -> None:
    latents = torch.randn(3, 8, 6, 6)
    together = reading.predict_velocity(latents, torch.tensor([0.5]), reading.encode_condition(reading.prompt(TEXTS)))
    for row, text in enumerate(TEXTS):
        condition = reading.encode_condition(reading.prompt([text]))
        alone = reading.predict_velocity(latents[row : row + 1], torch.tensor([0.5]), condition)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("taps", ["final", "learned_mix", "single", "bundle", "attend"])
def test_the_prompt_is_read_at_every_kind_of_tap(in_world: Path, taps: str) -> None:
    model = load_small_model(in_world, "ladder.prompt_context=true", f"taps={taps}")
    inputs = model.prompt(TEXTS)
    assert model.encode_condition(inputs).states.shape[2] > model.ladder.queries.shape[0]
    assert loss_gradients(model, inputs)["ladder.queries"].abs().max() > 0


def test_the_prompt_as_context_needs_the_prompt_code(reading: UniImage, in_world: Path) -> None:
    with pytest.raises(ValueError, match=r"needs inputs of model.prompt\(\)"):
        reading.encode_condition(reading.prompt(TEXTS, padding_side="left"))
    with pytest.raises(Exception, match=r"ladder.prompt_context needs ladder.connector=shared_mlp or per_tap_mlp"):
        load_small_model(in_world, "ladder=transformer", "ladder.prompt_context=true")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('the word "LT" in red', 'the word "LT" (L T) in red'),
        ('"a b" and "c"', '"a b" (a b) and "c" (c)'),
        ("no word", "no word"),
        ('an empty "" and a blank " "', 'an empty "" and a blank " "'),
        ('one " alone', 'one " alone'),
        ('"ÄÖ"', '"ÄÖ" (Ä Ö)'),
    ],
)
def test_words_are_spelled(text: str, expected: str) -> None:
    assert spell_quoted_words(text) == expected


def test_words_are_spelled_for_drawing_alone(in_world: Path) -> None:
    plain, spelling = load_small_model(in_world), load_small_model(in_world, "model.spell_words=true")
    text = 'the word "LT"'
    assert torch.equal(spelling.prompt([text])["input_ids"], plain.prompt([spell_quoted_words(text)])["input_ids"])
    asked = [m.prompt([text], padding_side="left")["input_ids"] for m in (plain, spelling)]
    assert torch.equal(*asked)


def test_an_export_keeps_them(in_world: Path, tmp_path: Path) -> None:
    model = load_small_model(in_world, *ALL)
    assert model.denoiser.reference_embed is not None
    torch.nn.init.normal_(model.denoiser.reference_embed.weight)
    model.save_pretrained(tmp_path / "export")
    assert "denoiser.reference_embed.weight" in load_file(tmp_path / "export" / "model.safetensors")
    again = UniImage.from_pretrained(tmp_path / "export")
    config = again.provenance.config
    assert config.reference_latents
    assert config.spell_words
    assert config.ladder.prompt_context
    prompts = 'the word "LT"', [[make_noise_image(1)]]
    options = {"num_inference_steps": 2, "latents": torch.randn(1, 8, 6, 6), "output_type": "latent"}
    made = [UniImagePipeline(m)(prompts[0], image=prompts[1], **options).images for m in (model, again)]
    torch.testing.assert_close(*made)


@pytest.mark.parametrize("options", WAYS_OF_READING[1:], ids=str)
def test_a_checkpoint_and_an_export_keep_how_layers_are_read(in_world: Path, tmp_path: Path, options: list) -> None:
    model = load_small_model(in_world, *options)
    with torch.no_grad():
        for name, parameter in model.ladder.named_parameters():
            if name.startswith("mix_"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "export")
    saved = saved_of(model, "run.ckpt")
    assert saved.config.taps == model.ladder.plan
    for again in (UniImage.from_pretrained(tmp_path / "export"), UniImage.from_saved(saved)):
        conditions = [m.encode_condition(m.prompt(TEXTS)).states for m in (model, again)]
        torch.testing.assert_close(*conditions)
    assert model.ladder.plan.describe() in (tmp_path / "export" / "README.md").read_text()


def saved_of(model: UniImage, origin: str) -> SavedModel:
    """What a training checkpoint of `model` would hold of it."""
    return read_saved_model({FACTS: describe_model(model), "state_dict": model.get_trained_state()}, origin)


def test_a_model_without_is_tuned_with_them(model: UniImage, in_world: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = model.get_trained_state()
    tuned = load_small_model(in_world, *ALL)
    load_weights(saved_of(model, "before.ckpt"), tuned)
    assert "prompt_context False -> True" in caplog.text
    assert "without references: their embedding starts at zero" in caplog.text
    assert all(torch.equal(tuned.get_trained_state()[k], v) for k, v in state.items())
    with pytest.raises(ValueError, match=r"unexpected denoiser.reference_embed"):
        load_weights(saved_of(tuned, "tuned.ckpt"), model)

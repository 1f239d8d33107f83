"""The training module: what it trains, what it never touches, what it repeats exactly."""

from typing import Any

import pytest
import torch

from tbac.models import UniImage
from tbac.training.randomness import draw_noise
from tbac.training.stages import FlowOptions
from tests.helpers.training import make_data, make_module, make_trainer
from tests.helpers.worlds import load_all_parts


def test_no_bit_of_the_frozen_parts_changes_and_all_others_train(model: UniImage) -> None:
    before = {k: v.clone() for k, v in load_all_parts(model).state_dict().items()}
    answers = model.answer(["what color is the circle?"], None, 4)
    module = make_module(model)
    make_trainer(4).fit(module, datamodule=make_data(model, "stage=ti2i_pretrain"))
    after = model.state_dict()
    for name, value in after.items():
        if name.startswith(("mllm.", "autoencoder.")):
            assert torch.equal(value, before[name]), name
    assert model.answer(["what color is the circle?"], None, 4) == answers
    unmoved = [k for k in after if k.startswith(("ladder.", "denoiser.")) and torch.equal(after[k], before[k])]
    assert unmoved == []


def test_only_queries_connector_and_denoiser_are_registered(model: UniImage) -> None:
    module = make_module(model)
    assert {name.split(".")[0] for name in module.state_dict()} == {"ladder", "denoiser"}
    assert sum(p.numel() for p in module.parameters()) == sum(
        p.numel() for part in (model.ladder, model.denoiser) for p in part.parameters()
    )


def test_the_step_is_its_equation(model: UniImage) -> None:
    module = make_module(model)
    batch = next(iter(make_data(model).train_dataloader()))
    noise, sigma = torch.randn_like(batch.latents), torch.tensor([0.1, 0.4, 0.7, 1.0])
    scale = sigma.view(-1, 1, 1, 1)
    noisy = (1 - scale) * batch.latents + scale * noise
    predicted = model.denoiser(noisy, 1000 * sigma, model.encode_condition(batch.prompt))
    expected = (predicted - (noise - batch.latents)).square().mean()
    torch.testing.assert_close(module.compute_loss(batch, noise, sigma, batch.latents), expected)


def test_several_noises_per_prompt_are_the_mean_of_single_ones(model: UniImage) -> None:
    module = make_module(model)
    batch = next(iter(make_data(model).train_dataloader()))
    count, size = 3, len(batch)
    latents = batch.latents.repeat_interleave(count, dim=0)
    noise, sigma = torch.randn_like(latents), torch.rand(size * count)
    together = module.compute_loss(batch, noise, sigma, latents)
    together.backward()
    gradient = model.ladder.queries.grad.clone()
    model.zero_grad()
    alone = sum(
        module.compute_loss(batch, noise[i::count], sigma[i::count], batch.latents) / count for i in range(count)
    )
    alone.backward()
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(gradient, model.ladder.queries.grad, rtol=1e-4, atol=1e-7)


def test_one_noise_per_prompt_is_the_plain_step(model: UniImage) -> None:
    module = make_module(model)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    batch = next(iter(make_data(model).train_dataloader()))
    stepped = module.training_step(batch, 0)
    noise, sigma = draw_noise([f"42/t2i_pretrain/{i}" for i in range(4)], batch.latents)
    assert torch.equal(stepped, module.compute_loss(batch, noise, sigma, batch.latents))


def test_validation_noise_follows_from_the_keys_alone() -> None:
    latents = torch.zeros(3, 2, 4, 4)
    noise, sigma = draw_noise(["a", "b", "c"], latents)
    again, sigma_again = draw_noise(["c", "a"], latents[:2])
    assert torch.equal(noise[[2, 0]], again)
    assert torch.equal(sigma[[2, 0]], sigma_again)
    assert not torch.equal(noise[0], noise[1])


def test_validation_repeats_exactly_and_whatever_the_batch_size(model: UniImage) -> None:
    losses = []
    for size in (4, 4, 8):
        result = make_trainer(1).validate(
            make_module(model), make_data(model, f"stage.batch_size={size}"), verbose=False
        )
        losses.append(result[0]["val/loss"])
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)


def test_two_runs_of_one_seed_are_equal(in_world: Any) -> None:
    from tests.helpers.worlds import load_small_model

    states = []
    for _ in range(2):
        model = load_small_model(in_world)
        make_trainer(3).fit(make_module(model), datamodule=make_data(model))
        states.append(model.get_trained_state())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_training_learns(model: UniImage) -> None:
    data = make_data(model, "stage.batch_size=16")
    first = make_trainer(1).validate(make_module(model), data, verbose=False)[0]["val/loss"]
    module = make_module(model, steps=30)
    make_trainer(30, gradient_clip_val=1.0).fit(module, datamodule=data)
    last = make_trainer(1).validate(module, data, verbose=False)[0]["val/loss"]
    assert last < 0.9 * first


@pytest.mark.parametrize("stage", ["t2i_pretrain", "ti2i_pretrain"])
@pytest.mark.parametrize("noises", [1, 3])
def test_a_step_never_waits_for_the_device(model: UniImage, stage: str, noises: int) -> None:
    """Nothing of the device is read: on the meta device, which holds no numbers, each read would raise."""
    module = make_module(model, flow=FlowOptions(noise_samples_per_prompt=noises))
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    batch = next(iter(make_data(model, f"stage={stage}").train_dataloader()))
    assert ("pixel_values" in batch.prompt) == (stage == "ti2i_pretrain")
    model.to("meta")
    module.to("meta")
    loss = module.training_step(batch.to("meta"), 0)
    loss.backward()
    assert loss.device.type == "meta"
    for read in (loss.item, loss.cpu, loss.view(1).nonzero, lambda: bool(loss > 0)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()

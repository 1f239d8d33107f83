"""Reinforcement of the flow model by DiffusionNFT: the loss of a step comes from pictures that the old policy draws."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from tbac.distributed import find_max_over_ranks, sum_over_ranks
from tbac.files import ForeignFileError, reading
from tbac.flow import interpolate
from tbac.reinforcement import Advantages, compute_advantages, compute_distance, compute_nft_loss, compute_preferences
from tbac.training.callbacks.checkpoint import Checkpoint
from tbac.training.callbacks.preemption import Preemption
from tbac.training.groups import Asked, Groups, PromptOrder, choose_prompts, draw_groups, list_rows
from tbac.training.interruptions import INTERRUPTION
from tbac.training.module import LadderTuningModule
from tbac.training.policies import Policy
from tbac.training.randomness import draw_noise
from tbac.training.reinforce_options import ReinforceOptions
from tbac.training.rewarding import UnansweredError, WeightedReward, collect_prompts, score_pictures
from tbac.types import Batch

POLICIES = "policies"  # in a checkpoint: name of a policy -> its weights by name


class Reinforce(L.Callback):
    """Gives a stage the objective of DiffusionNFT, and keeps the policies that it needs.

    A batch of the stage says which places in the sequence of draws a process has. In each place the old policy draws a
    group of pictures of one prompt, without guidance; the rewards score them; and the loss is computed on those groups
    whose scores differ. The old policy follows the trained one after each round, also where a round has several
    optimizer steps: within it, pictures are drawn just before they are needed, by the same policy. So the state of a
    run is the old policy, the reference, and how many steps of the round are over. A step that the guard rejects isn't
    one, and a guard that goes back to a checkpoint takes the old policy with it.

    Args:
        rewards: what pictures are scored by.
        options: of the stage.
        seed: of the order of prompts.

    Raises:
        ValueError: without rewards, and for prompts that a reward can't score.
    """

    def __init__(self, rewards: Sequence[WeightedReward], options: ReinforceOptions, seed: int = 42) -> None:
        if not rewards:
            raise ValueError("stage.reinforce needs a reward: give reward=NAME")
        self.rewards, self.options = list(rewards), options
        prompts = collect_prompts(options.prompts, self.rewards)
        self.order = None if prompts is None else PromptOrder(prompts, seed)
        self.round = self.round_steps = 0  # rounds that are over, and optimizer steps of the present one
        self.policies: dict[str, Policy] = {}  # `old`, and `reference`, what the stage began with, if it is needed
        self._resumed: Mapping[str, Mapping[str, Tensor]] | None = None
        self._position: dict[str, Any] = {}  # in the data, after the last optimizer step

    # The policies, and what a checkpoint holds of them.

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with policies that equal the model, or go on with those of the checkpoint."""
        assert isinstance(pl_module, LadderTuningModule)
        names = ["old", "reference"] if self.options.loss.kl_weight else ["old"]
        self.policies = {name: Policy(pl_module) for name in names}
        if self._resumed is not None:
            for name, policy in self.policies.items():
                if not isinstance(self._resumed.get(name), Mapping):
                    raise ForeignFileError(
                        f"the checkpoint holds no {name} policy; stage.reinforce.loss.kl_weight must stay 0 or above 0"
                    )
                with reading(f"the {name} policy of the checkpoint"):
                    policy.load(pl_module, self._resumed[name], f"the {name} policy of the checkpoint")
            self._resumed = None
        self._position = trainer.datamodule.state_dict()  # type: ignore[attr-defined]
        pl_module.objective = partial(self.compute_loss, trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Let the old policy follow at the end of a round."""
        assert isinstance(pl_module, LadderTuningModule)
        if pl_module.attempted:
            self._position = trainer.datamodule.state_dict()  # type: ignore[attr-defined]
        if not pl_module.stepped:
            return
        self.round_steps += 1
        if self.round_steps == self.options.rounds.steps:
            self.policies["old"].approach(pl_module, self.options.rounds.compute_decay(self.round))
            self.round, self.round_steps = self.round + 1, 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        pl_module.objective = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.policies = {}

    def state_dict(self) -> dict[str, Any]:
        return {"round": self.round, "round_steps": self.round_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.round, self.round_steps = state_dict["round"], state_dict["round_steps"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        checkpoint[POLICIES] = {name: policy.collect(pl_module) for name, policy in self.policies.items()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed = checkpoint.get(POLICIES, {})

    def copy_state(self) -> dict[str, Any]:
        """Copy to CPU memory what changes from step to step, for a guard that may go back to it."""
        old = self.policies["old"].weights
        return self.state_dict() | {"old": [weights.to("cpu", copy=True) for weights in old]}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Go back to what `copy_state` returned."""
        self.load_state_dict(dict(state))
        for own, kept in zip(self.policies["old"].weights, state["old"], strict=True):
            own.copy_(kept)

    # The objective.

    def compute_loss(self, trainer: L.Trainer, module: LadderTuningModule, batch: Batch) -> Tensor:
        """Draw, score and compare pictures, and compute the loss on them.

        Args:
            trainer: whose run waits while a reward fails.
            module: predicts velocities.
            batch: says which places in the sequence of draws this process has.
        """
        size = self.options.drawing.group_size
        asked = choose_prompts(module.model, batch, self.order, f"{module.seed}/{module.stage.name}")
        with self.policies["old"].act(module):
            groups = draw_groups(module.model, asked, self.options.drawing)
        scores = self._score(trainer, module, asked, groups)
        weights = scores.new_tensor([each.weight for each in self.rewards])
        advantages = compute_advantages(scores.unflatten(1, (-1, size)), weights)
        self._log(module, scores, advantages, groups)
        loss = self._compare(module, asked, groups, advantages)
        if self.options.supervised_weight:
            loss = loss + self.options.supervised_weight * module.compute_training_loss(batch)
        return loss

    def _score(self, trainer: L.Trainer, module: LadderTuningModule, asked: Asked, groups: Groups) -> Tensor:
        """Score the pictures of all groups: (reward, picture); a run that can wait no longer is saved and ends."""
        rows = list_rows(len(asked.prompts), self.options.drawing.group_size)
        prompts = [asked.prompts[row] for row in rows]
        beat = partial(self._look_for_signals, trainer, module)
        device = trainer.strategy.root_device
        try:
            return score_pictures(self.rewards, prompts, groups.pictures, self.options.patience, beat, device)
        except UnansweredError:
            self._go_back(trainer)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, Checkpoint) and module.steps:
                    callback.save(trainer, module)
                    callback.finish(trainer)
            raise

    def _look_for_signals(self, trainer: L.Trainer, module: LadderTuningModule) -> None:
        """End the run in good order if a signal has come during a pause; the watchdog sees that processes are alive."""
        module.begun += 1
        if not find_max_over_ranks(INTERRUPTION.received or 0, trainer.strategy.root_device):
            return
        self._go_back(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Preemption):
                callback.stop_if_told(trainer, module)

    def _go_back(self, trainer: L.Trainer) -> None:
        """Forget the batches since the last optimizer step: they come again when the run goes on."""
        trainer.datamodule.load_state_dict(self._position)  # type: ignore[attr-defined]

    def _compare(self, module: LadderTuningModule, asked: Asked, groups: Groups, advantages: Advantages) -> Tensor:
        """Compute the loss on the groups that teach something, as a mean over all pictures, also those of other groups.

        So it doesn't depend on how pictures are divided among processes and batches.
        """
        size, draws = self.options.drawing.group_size, module.stage.flow.noise_samples_per_prompt
        # Where no group is left, one picture without weight keeps all processes at the same computation.
        kept = advantages.informative.repeat_interleave(size).nonzero().flatten()
        weight = 1.0 if len(kept) else 0.0
        kept = kept if len(kept) else torch.zeros(1, dtype=torch.long)
        # The pictures are mixed with noise anew, some times each.
        places = kept.repeat_interleave(draws)
        latents = groups.latents[places.to(groups.latents.device)]
        noise, sigma = draw_noise([groups.names[place] for place in kept.tolist()], latents, module.stage.flow)
        path = interpolate(latents, noise, sigma)
        rows = places // size
        # All policies predict at the same points.
        predictions: dict[str, Tensor] = {}
        for name, policy in self.policies.items():
            with policy.act(module):
                predictions[name] = module.predict_velocity(asked.inputs, path.noisy, sigma, rows)
        velocity = module.predict_velocity(asked.inputs, path.noisy, sigma, rows)
        preference = compute_preferences(advantages.values.flatten()[places]).to(latents)
        losses = compute_nft_loss(velocity, predictions["old"], path, latents, preference, self.options.loss)
        if "reference" in predictions:
            losses = losses + self.options.loss.kl_weight * compute_distance(velocity, predictions["reference"])
        return weight * losses.sum() / (len(groups.names) * draws)

    def _log(self, module: LadderTuningModule, scores: Tensor, advantages: Advantages, groups: Groups) -> None:
        """Log means over all processes: rewards, spread, groups without any, how much pictures of a group differ."""
        size, count = self.options.drawing.group_size, len(self.rewards)
        latents = groups.latents.unflatten(0, (-1, size))
        variety = latents.std(dim=1, correction=0).mean(dim=(1, 2, 3))
        # Sums and counts of each number, so that all processes log the same.
        numbers = {
            **{f"reward/{each.name}": values for each, values in zip(self.rewards, scores, strict=True)},
            "spread": advantages.spread.flatten(),
            "dropped": (~advantages.informative).double(),
            "unscored": scores.isnan().double().flatten(),
            "variety": variety.double(),
        }
        device = latents.device
        sums = torch.stack([values.nansum().to(device).float() for values in numbers.values()])
        known = torch.tensor([float((~values.isnan()).sum()) for values in numbers.values()], device=device)
        totals = sum_over_ranks(torch.stack([sums, known]))
        means = dict(zip(numbers, (totals[0] / totals[1].clamp(min=1)).tolist(), strict=True))
        rewards = [means[f"reward/{each.name}"] * each.weight for each in self.rewards]
        means["reward"] = sum(rewards) / sum(each.weight for each in self.rewards)
        if count == 1:
            del means[f"reward/{self.rewards[0].name}"]
        module.log_dict({f"reinforce/{name}": value for name, value in means.items()}, batch_size=len(groups.names))

"""The LightningModule of ladder tuning: prepare, compute the loss, log."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from tbac.distributed import gather_objects, get_world_size, shard, sum_over_ranks
from tbac.flow import compute_velocity_loss, interpolate
from tbac.models import UniImage
from tbac.models.saved import FACTS
from tbac.training.cuda_graphs import StepGraphs
from tbac.training.gradients import GradientNorms, clip_gradients, measure_gradient_norms
from tbac.training.optimizers import list_optimized_names, load_named_state, make_parameter_groups, resume_optimizer
from tbac.training.randomness import draw_noise, read_random_state, set_random_state
from tbac.training.stages import Stage
from tbac.types import Batch


class LadderTuningModule(L.LightningModule):
    """Trains queries, connector and denoiser of a `UniImage`.

    Only these are parameters of this module: the frozen MLLM and autoencoder are held by reference, so that
    checkpoints, weight averages and gradient synchronisation never touch them.

    Args:
        model: the whole model.
        stage: what is trained, and how; `enter` begins another one.
        seed: seed of noise and noise levels.
        facts: what checkpoints hold of the model besides tensors (`tbac.training.checkpoints.describe_model`).
    """

    def __init__(self, model: UniImage, stage: Stage, seed: int = 42, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._held = (model,)  # in a tuple, so that torch doesn't register the frozen parts in this module
        self.ladder = model.ladder
        self.denoiser = model.denoiser
        self.seed = seed
        self.facts = dict(facts or {})
        self.attempted = self.rejected = False  # whether this batch ended in an optimizer step, and in none after all
        self.begun = 0  # batches whose computation has begun in this process
        self.first_step = 0  # optimizer steps of the run before this fit, with rejected ones
        self.norms: GradientNorms | None = None
        self._context_squares: Tensor | None = None  # (block,)
        self.graphs: StepGraphs | None = None  # if set, steps run by recorded CUDA graphs
        self.objective: Callable[[Batch], Tensor] | None = None  # what a stage minimises in place of the usual loss
        self.enter(stage, stage.steps or 1)

    def enter(self, stage: Stage, total_steps: int) -> None:
        """Begin a stage: count its steps from 0 and train what it trains.

        Args:
            stage: what is trained, and how.
            total_steps: optimizer steps of its schedule.
        """
        self.stage, self.total_steps = stage, total_steps
        self.objective = None
        self.steps = 0  # optimizer steps taken in this stage, without rejected ones
        self.measure_taps = False  # whether `compute_tap_norms` will be called
        self.inherited_optimizer_state: Mapping[str, dict[str, Any]] | None = None  # by parameter name
        self._resumed: Mapping[str, Any] | None = None  # the checkpoint, until all of its state has been taken
        stage.apply_trainable(self.named_parameters())
        if self.graphs is not None:
            self.graphs.forget()

    def resume(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue stage, optimizer, schedule and random numbers from a checkpoint.

        `tbac.training.checkpoints.load_weights` must have loaded its weights before.
        """
        self._resumed = checkpoint
        self.steps, self.first_step = checkpoint[FACTS]["steps"], checkpoint["global_step"]

    @property
    def run_step(self) -> int:
        """Optimizer steps of the whole run so far, all its stages, with rejected ones."""
        return self.first_step + self.trainer.global_step

    @property
    def model(self) -> UniImage:
        return self._held[0]

    def list_trained(self) -> list[tuple[str, nn.Parameter]]:
        """List the parameters that this stage trains, by name."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    @property
    def stepped(self) -> bool:
        """Whether this batch ended in an optimizer step that was taken."""
        return self.attempted and not self.rejected

    def configure_model(self) -> None:
        """Shard the denoiser where the strategy has a mesh of processes for it."""
        if self.device_mesh is not None:
            shard(self.denoiser, self.denoiser.transformer.transformer_blocks, self.device_mesh.device_type)

    def setup(self, stage: str) -> None:
        """Bring the frozen parts to the device of this process."""
        self.model.to(self.device)

    def on_fit_start(self) -> None:
        self.model.to(self.device)
        if self.graphs is not None:  # the weights may lie elsewhere now
            self.graphs.forget()

    def on_train_start(self) -> None:
        if self._resumed is not None:
            set_random_state(self._resumed[FACTS]["random"])
            self._resumed = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what describes the model, and what an exact continuation needs."""
        checkpoint["global_step"] = self.run_step
        checkpoint[FACTS] = self.facts | {
            "stage": self.stage.name,
            "config": {**self.stage.config, **self.facts.get("config", {})},  # the model's as it was resolved
            "steps": self.steps,
            "optimized": list_optimized_names(self.trainer.optimizers[0], self),
            "random": gather_objects(read_random_state()),
        }

    def compute_loss(self, batch: Batch, noise: Tensor, sigma: Tensor, latents: Tensor) -> Tensor:
        """Compute the flow-matching loss of a batch.

        Args:
            batch: gives the prompts, each of which is read once.
            noise: the same shape as `latents`.
            sigma: (batch * k,), one for each row of `latents`.
            latents: (batch * k, channel, height, width), the k rows of a sample next to each other.
        """
        path = interpolate(latents, noise, sigma)
        rows = None
        if len(latents) != len(batch):
            rows = torch.arange(len(batch), device=self.device).repeat_interleave(len(latents) // len(batch))
        prediction = self.predict_velocity(batch.prompt, path.noisy, sigma, rows)
        return compute_velocity_loss(prediction, path.velocity)

    def predict_velocity(self, inputs: Any, noisy: Tensor, sigma: Tensor, rows: Tensor | None = None) -> Tensor:
        """Predict `noise - latents` from prompts, each of which is read once.

        Args:
            inputs: what the model's `prompt` made.
            noisy: (batch, channel, height, width).
            sigma: (batch,).
            rows: which prompt each of the batch belongs to; None where they follow each other one by one.
        """
        runner = self.graphs if self.graphs is not None and torch.is_grad_enabled() else self.model
        condition = runner.encode_condition(inputs)
        if self.measure_taps and condition.states.requires_grad:
            condition.states.register_hook(self._measure_contexts)
        if rows is not None:
            condition = condition[rows.to(self.device)]
        return runner.predict_velocity(noisy, sigma, condition)

    def _measure_contexts(self, gradient: Tensor) -> None:
        """Add the squares of each block's context gradient to those of the step's earlier micro-batches."""
        squares = gradient.detach().double().square().sum((1, 2, 3))
        self._context_squares = squares if self._context_squares is None else self._context_squares + squares

    def compute_tap_norms(self) -> dict[str, float]:
        """Compute the gradient norm of the contexts that come from each tap, or bundle; all processes must call this.

        With mixed taps there is one norm for each block, since each block reads its own mix.
        """
        if self._context_squares is None:
            return {}
        squares = sum_over_ranks(self._context_squares) / get_world_size() ** 2  # gradients are means over processes
        plan = self.model.ladder.plan
        names = [f"block_{i:02d}_context" for i in range(plan.num_blocks)]
        if not plan.mixed:
            layers = [[plan.layers[position] for position in reading] for reading in plan.list_readings()]
            names = ["tap_" + "-".join(f"{layer:02d}" for layer in reading) for reading in layers]
        sums: dict[str, float] = defaultdict(float)
        for name, square in zip(names, squares.tolist(), strict=True):
            sums[name] += square
        return {name: math.sqrt(total) for name, total in sums.items()}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.attempted = self.rejected = False

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss: flow matching's, unless the stage has another objective."""
        self.begun += 1
        loss = self.compute_training_loss(batch) if self.objective is None else self.objective(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        return loss

    def compute_training_loss(self, batch: Batch) -> Tensor:
        """Compute the loss, with noise and sigmas that depend only on seed, stage and each sample's number of draw."""
        latents = get_latents(self.model, batch)
        names = [f"{self.seed}/{self.stage.name}/{position}" for position in batch.positions]
        noise, sigma = draw_noise(names, latents, self.stage.flow)
        latents = latents.repeat_interleave(self.stage.flow.noise_samples_per_prompt, dim=0)
        return self.compute_loss(batch, noise, sigma, latents)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss, with noise and sigmas that depend only on each sample's key: the same in every validation."""
        latents = get_latents(self.model, batch)
        noise, sigma = draw_noise(batch.keys, latents)
        loss = self.compute_loss(batch, noise, sigma, latents)
        self.log("val/loss", loss, prog_bar=True, on_epoch=True, sync_dist=True, batch_size=len(batch))

    def measure_gradients(self) -> GradientNorms:
        """Return the gradient norms of the coming optimizer step, which are measured only once."""
        if self.norms is None:
            self.norms = measure_gradient_norms(self.named_parameters())
        return self.norms

    def reject_step(self) -> None:
        """Make the coming optimizer step an exact no-op: optimizers pass over parameters without a gradient."""
        self.rejected = True
        for parameter in self.parameters():
            parameter.grad = None

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the global norm, which the guard may have measured already."""
        if gradient_clip_val and not self.rejected:
            clip_gradients(self.parameters(), gradient_clip_val, self.measure_gradients().total.float())

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Take an optimizer step, and count it unless the guard has rejected it on the way."""
        self.norms = None
        self.attempted = True
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.norms = self._context_squares = None
        self.steps += not self.rejected

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Move the schedule on, unless the step was rejected."""
        if self.stepped:
            super().lr_scheduler_step(scheduler, metric)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.stage.optimizer(make_parameter_groups([self.ladder, self.denoiser], self.stage.weight_decay))
        scheduler = self.stage.scheduler(optimizer, total_steps=self.total_steps)
        if self._resumed is not None:
            resume_optimizer(optimizer, scheduler, self, self._resumed)
        elif self.inherited_optimizer_state is not None:
            load_named_state(optimizer, self, self.inherited_optimizer_state)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def get_latents(model: UniImage, batch: Batch) -> Tensor:
    """Return the batch's cached latents, or encode its target images: (batch, channel, height, width)."""
    if batch.latents is not None:
        return batch.latents
    assert batch.pixels is not None
    return model.autoencoder.encode(batch.pixels).float()

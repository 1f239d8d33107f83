"""UniImagePipeline, a pipeline of diffusers: makes pictures from prompts and images, and answers questions."""

import copy
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput, logging
from torch import Tensor

from tbac.models import UniImage
from tbac.models.locks import CallLock, one_at_a_time
from tbac.sampling.arguments import (
    CALLBACK_TENSORS,
    check_callback_tensors,
    check_counts,
    check_output_type,
    check_prompt_form,
    list_texts,
    repeat_negatives,
)
from tbac.sampling.conditions import encode_branches, encode_texts, join_embeds
from tbac.sampling.guidance import Guidance
from tbac.sampling.inputs import ImageInput, group_images
from tbac.sampling.latents import check_noise, compute_latent_shape, convert_output, draw_noise
from tbac.sampling.offload import PartOffload
from tbac.sampling.solver import FlowSolver, check_flow_scheduler, make_scheduler, set_timesteps

log = logging.get_logger(__name__)


@dataclass
class UniImageOutput(BaseOutput):
    """The result of a call of the pipeline.

    Attributes:
        images: PIL images; or pixels in [0, 1], as an array (image, height, width, 3) or a tensor (image, 3, height,
            width); or scaled latents. Images of one prompt follow each other.
    """

    images: Any


class UniImagePipeline(DiffusionPipeline):
    """Generates and answers with one model.

    Loading, `to`, `components`, `progress_bar` and so on are those of diffusers. A scheduler of diffusers that follows
    a flow may take the place of `scheduler`; each call works on a copy of it, so several may run at once.

    Args:
        model: the model, which is put into evaluation mode.
        scheduler: the base model's own if None.
    """

    _optional_components: ClassVar[list[str]] = ["scheduler"]
    _callback_tensor_inputs: ClassVar[list[str]] = list(CALLBACK_TENSORS)

    def __init__(self, model: UniImage, scheduler: Any = None) -> None:
        super().__init__()
        scheduler = make_scheduler(model.scheduler_config) if scheduler is None else scheduler
        self.register_modules(model=model.eval(), scheduler=scheduler)
        self._interrupt = False
        self._num_timesteps = 0
        self._guidance_scale = self._image_guidance_scale = 1.0
        self._offload: PartOffload | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        torch_dtype: torch.dtype | str | None = None,
        scheduler: Any = None,
        device_map: str | None = None,
        **options: Any,
    ) -> "UniImagePipeline":
        """Load an exported folder; nothing that its files name is imported.

        Args:
            pretrained_model_name_or_path: the folder, or its hub id.
            torch_dtype: type of all weights; float32 if None. `dtype` is another name for it.
            scheduler: takes the place of the folder's own.
            device_map: `cpu` or `cuda`: where the model goes, as `to` would move it.
            options: further arguments of `UniImage.from_pretrained`; others of diffusers are ignored with a warning.

        Raises:
            ValueError: as `UniImage.from_pretrained`, and for a device map that isn't accepted.
        """
        if device_map not in (None, "cpu", "cuda"):
            raise ValueError(f"device_map must be null, cpu or cuda; got {device_map!r}")
        torch_dtype = options.pop("dtype", None) or torch_dtype or torch.float32
        known = inspect.signature(UniImage.from_pretrained).parameters
        ignored = sorted(options.keys() - known)
        if ignored:
            log.warning(f"{', '.join(ignored)}: not an option of {cls.__name__}.from_pretrained, ignored")
        options = {name: value for name, value in options.items() if name in known}
        model = UniImage.from_pretrained(pretrained_model_name_or_path, dtype=torch_dtype, **options)
        pipeline = cls(model, scheduler)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline if device_map is None else pipeline.to(device_map)

    def save_pretrained(
        self,
        save_directory: str | Path,
        standalone: bool = False,
        notes: Mapping[str, Any] | None = None,
        **unused: Any,
    ) -> None:
        """Write an exported folder, as `UniImage.save_pretrained` does, with this pipeline's scheduler.

        Args:
            save_directory: made where it doesn't exist.
            standalone: also copy the frozen parts' files, so that the folder loads without network.
            notes: more rows for the card.
            unused: what diffusers' own method takes besides; files are always whole safetensors.
        """
        scheduler = json.loads(self.scheduler.to_json_string())
        self.model.save_pretrained(save_directory, standalone, notes, scheduler)

    @property
    def lock(self) -> CallLock:
        """Threads that share the model wait for each other."""
        return self.model.lock

    # Parts of the model under the names that diffusers' pipelines have for them.

    @property
    def transformer(self) -> Any:
        return self.model.denoiser.transformer

    @property
    def vae(self) -> Any:
        return self.model.autoencoder.model

    @property
    def tokenizer(self) -> Any:
        return self.model.prompt.tokenizer

    # What the running or last call was asked for, for callbacks.

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def image_guidance_scale(self) -> float:
        return self._image_guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`: the steps that are left aren't taken."""
        return self._interrupt

    # Moving parts to a device only while they run.

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep MLLM, denoiser and autoencoder on the CPU, each on the device only while it runs.

        Queries and connectors are small and stay on the device.

        Args:
            gpu_id: index of the device.
            device: `cuda` if None.

        Raises:
            ValueError: without a device to compute on.
        """
        if device is None and not torch.cuda.is_available():
            raise ValueError("enable_model_cpu_offload() needs a GPU: torch finds none here; give device=")
        target = torch.device(device or "cuda")
        if gpu_id is not None:
            target = torch.device(target.type, gpu_id)
        self.remove_all_hooks()
        self.to("cpu")
        self.model.ladder.to(target)
        self._offload = PartOffload((self.model.mllm, self.model.denoiser, self.model.autoencoder), target)

    def enable_sequential_cpu_offload(self, *arguments: Any, **options: Any) -> None:
        """Refuse: the ladder runs layers part by part, which diffusers' hooks on whole layers don't see."""
        raise NotImplementedError("sequential offload isn't supported; use enable_model_cpu_offload()")

    def enable_group_offload(self, *arguments: Any, **options: Any) -> None:
        """Refuse, for the same reason."""
        raise NotImplementedError("group offload isn't supported; use enable_model_cpu_offload()")

    def remove_all_hooks(self) -> None:
        """End offloading; the parts stay where they are."""
        if self._offload is not None:
            self._offload.remove()
        self._offload = None

    def maybe_free_model_hooks(self) -> None:
        """Move the part that ran last back to the CPU, where offloading is on."""
        if self._offload is not None:
            self._offload.free()

    def to(self, *arguments: Any, **options: Any) -> "UniImagePipeline":
        """Move or cast the model as `torch.nn.Module.to` does; ends offloading."""
        self.remove_all_hooks()
        return super().to(*arguments, **options)

    # From prompts to conditions.

    @one_at_a_time
    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = "",
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Encode prompts for text-to-image, to be given to a call instead of the texts.

        Args:
            prompt: one text or several.
            negative_prompt: one for all or one per prompt; None is the empty text.
            do_classifier_free_guidance: also encode the negative prompts.
            num_images_per_prompt: how often each prompt's rows are repeated.

        Returns:
            prompt_embeds (prompt * num_images_per_prompt, block, query, channel), their mask (…, query) of 1 and 0, and
            both of the negative prompts, or None.
        """
        prompts = list_texts("prompt", prompt)
        negatives = repeat_negatives(negative_prompt, len(prompts))
        states, mask = encode_texts(self.model, prompts + negatives if do_classifier_free_guidance else prompts)
        found = []
        for rows in (slice(0, len(prompts)), slice(len(prompts), None)):
            found += [values[rows].repeat_interleave(num_images_per_prompt, 0) for values in (states, mask)]
        embeds, embeds_mask, negative_embeds, negative_mask = found
        if not do_classifier_free_guidance:
            return embeds, embeds_mask, None, None
        return embeds, embeds_mask, negative_embeds, negative_mask

    @one_at_a_time
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: ImageInput | Sequence[ImageInput | None] | None = None,
        negative_prompt: str | Sequence[str] | None = "",
        num_inference_steps: int = 30,
        guidance_scale: float = 4.5,
        image_guidance_scale: float = 1.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        height: int | None = None,
        width: int | None = None,
        callback_on_step_end: Callable[..., Mapping[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_TENSORS,
        return_dict: bool = True,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        batch_branches: bool = True,
    ) -> Any:
        """Generate pictures.

        Args:
            prompt: one text or several.
            image: input image(s) to edit: for one prompt an image or a list of images; for several prompts one entry
                per prompt (an image, a list, or None; a batch is either all edits or all text-to-image). An image is a
                PIL image, an array (height, width, 3), a tensor (3, height, width), or a path.
            negative_prompt: what the unconditional branch reads; one for all or one per prompt; None is the empty text.
            num_inference_steps: solver steps.
            guidance_scale: text guidance; 1 turns it off for text-to-image.
            image_guidance_scale: image guidance, for edits; 1 or less turns it off.
            num_images_per_prompt: pictures of each prompt.
            generator: source of the starting noise, or one per picture.
            latents: the starting noise itself (prompt * num_images_per_prompt, channel, height, width).
            output_type: `pil`, `np`, `pt` or `latent`.
            height: pixels; default: the denoiser's own size.
            width: pixels; default: the denoiser's own size.
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)` after each step; what it
                returns takes the place of the tensors. Set `pipeline._interrupt = True` in it to take no more steps.
            callback_on_step_end_tensor_inputs: which tensors it gets; there is `latents`.
            return_dict: False returns a tuple.
            timesteps: your own noise levels, 1000 = pure noise, for schedulers that take them.
            sigmas: the same in [0, 1].
            prompt_embeds: instead of `prompt`, what `encode_prompt` returned.
            prompt_attention_mask: of `prompt_embeds`; None = all take part.
            negative_prompt_embeds: as `prompt_embeds`; needed with it where there is guidance.
            negative_prompt_attention_mask: of `negative_prompt_embeds`.
            guidance_interval: noise levels (sigma) between which there is guidance; narrower is faster and changes
                the pictures.
            batch_branches: predict all guidance branches in one batch; False takes less memory and more time.

        Returns:
            `UniImageOutput`; or a tuple of its one value.

        Raises:
            ValueError: for numbers that don't fit each other or values that aren't accepted, before anything runs.
        """
        # Everything that the user can get wrong is checked before any weight is used.
        check_prompt_form(prompt, prompt_embeds, image)
        prompts = list_texts("prompt", prompt) if prompt_embeds is None else [""] * len(prompt_embeds)
        images = group_images(image, len(prompts))
        negatives = repeat_negatives(negative_prompt, len(prompts))
        check_callback_tensors(callback_on_step_end_tensor_inputs)
        check_output_type(output_type)
        check_counts(num_inference_steps, num_images_per_prompt)
        # Text-to-image has one guidance scale, edits have two, and one batch can't mix them.
        edits = [bool(group) for group in images]
        low, high = guidance_interval
        image_scale = image_guidance_scale if any(edits) else None
        guidance = Guidance(guidance_scale, image_scale, (low, high), batch_branches)
        if any(edits) and not all(edits):
            raise ValueError("a batch is either all edits or all text-to-image: give every prompt an image, or none")
        # Where the solver starts, and which noise levels it visits.
        shape = compute_latent_shape(self.model, len(prompts) * num_images_per_prompt, height, width)
        noise = draw_noise(shape, generator) if latents is None else latents
        check_noise(noise, shape)
        check_flow_scheduler(self.scheduler)
        scheduler = copy.deepcopy(self.scheduler)
        set_timesteps(scheduler, num_inference_steps, self.model.device, timesteps, sigmas)

        # The condition is encoded once, and read in every step.
        if prompt_embeds is None:
            factor = self.model.autoencoder.compression
            size = (shape[2] * factor, shape[3] * factor)
            condition = encode_branches(self.model, prompts, images, negatives, guidance, size)
        else:
            given = {
                "prompt_embeds": prompt_embeds,
                "prompt_attention_mask": prompt_attention_mask,
                "negative_prompt_embeds": negative_prompt_embeds,
                "negative_prompt_attention_mask": negative_prompt_attention_mask,
            }
            condition = join_embeds(self.model, guidance, given)
        # Rows (branch, prompt) -> (branch, prompt, picture): each picture keeps the condition of its own prompt.
        if num_images_per_prompt > 1:
            rows = torch.arange(len(guidance.branches) * len(prompts), device=self.model.device)
            condition = condition[rows.repeat_interleave(num_images_per_prompt)]

        # Schedulers that add noise take one generator, so with one per picture they draw from torch's own.
        single = generator if isinstance(generator, torch.Generator) else None
        solver = FlowSolver(self.model, condition, guidance, scheduler, single)
        solved = solver.scale_noise(noise.to(self.model.device))
        self._guidance_scale, self._image_guidance_scale = guidance_scale, image_guidance_scale
        self._interrupt, self._num_timesteps = False, len(solver.timesteps)
        solved = self._solve(solver, solved, callback_on_step_end, callback_on_step_end_tensor_inputs)
        if not solved.isfinite().all():
            raise ValueError(
                f"the picture holds NaN or infinite numbers; guidance_scale={guidance_scale} may be too large, or "
                f"{self.model.ladder.queries.dtype} too narrow for this model"
            )
        made = convert_output(self.model.autoencoder, solved, output_type)
        self.maybe_free_model_hooks()
        return UniImageOutput(images=made) if return_dict else (made,)

    def _solve(
        self,
        solver: FlowSolver,
        latents: Tensor,
        callback: Callable[..., Mapping[str, Tensor] | None] | None,
        names: Sequence[str],
    ) -> Tensor:
        """Take the solver's steps, with a callback after each; returns the latents."""
        with self.progress_bar(total=len(solver.timesteps)) as bar:
            for index, timestep in enumerate(solver.timesteps):
                if self.interrupt:
                    break
                latents = solver.step(latents, index)
                if callback is not None:
                    tensors = {"latents": latents} if names else {}
                    changed = callback(self, index, timestep, tensors) or {}
                    latents = changed.get("latents", latents)
                bar.update()
        return latents

    @one_at_a_time
    @torch.no_grad()
    def answer(
        self,
        question: str | Sequence[str],
        image: ImageInput | Sequence[ImageInput | None] | None = None,
        max_new_tokens: int = 64,
        streamer: Any = None,
        **sampling: Any,
    ) -> Any:
        """Answer a question, about an image or several if given, with the untouched MLLM.

        Args:
            question: one text; or several, which are answered in one batch.
            image: as of a call: for one question an image or a list of images, for several one entry per question.
            max_new_tokens: longest answer in tokens.
            streamer: a streamer of transformers, such as `TextStreamer`, which gets the tokens of a single answer.
            sampling: `do_sample`, `temperature`, `top_k`, `top_p`, `repetition_penalty`, as of transformers'
                `generate`, and `seed` (`tbac.models.answering.AnswerOptions`). Without them the answer is greedy.

        Returns:
            The answer; a list of answers for a list of questions.

        Raises:
            TypeError: for an option that there isn't.
            ValueError: for an option's value that isn't accepted, and for a streamer with several questions.
        """
        questions = [question] if isinstance(question, str) else list(question)
        if not questions:
            return []
        images = group_images(image, len(questions))
        answers = self.model.answer(questions, images, max_new_tokens, streamer, **sampling)
        self.maybe_free_model_hooks()
        return answers[0] if isinstance(question, str) else answers

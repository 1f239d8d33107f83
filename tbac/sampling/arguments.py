"""Checks of what a call of the pipeline is given, apart from its images; each error names argument and value."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tbac.files import is_valid_text, shorten
from tbac.models.checks import is_count

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ("latents",)


def check_prompt_form(prompt: Any, prompt_embeds: Any, image: Any) -> None:
    """Raise ValueError unless there is a prompt in one form, and no image beside one that is encoded already."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("give prompt or prompt_embeds, and not both")
    if prompt_embeds is not None and image is not None:
        raise ValueError("prompt_embeds are for text-to-image; give image= with prompt=")


def check_callback_tensors(names: Sequence[str]) -> None:
    """Raise ValueError for a tensor that a callback can't get."""
    unknown = [name for name in names if name not in CALLBACK_TENSORS]
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs may hold {CALLBACK_TENSORS}; got {unknown[0]!r}")


def check_output_type(output_type: Any) -> None:
    """Raise ValueError for a form that pictures can't be returned in."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")


def check_counts(num_inference_steps: Any, num_images_per_prompt: Any) -> None:
    """Raise ValueError unless both are whole numbers of at least 1."""
    if not is_count(num_inference_steps) or not is_count(num_images_per_prompt):
        raise ValueError(
            "num_inference_steps and num_images_per_prompt must be at least 1, whole numbers; got "
            f"{num_inference_steps} and {num_images_per_prompt}"
        )


def list_texts(name: str, value: Any) -> list[str]:
    """Return one text or several as a list; raise ValueError without any, and for what can't be written as UTF-8."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts:
        raise ValueError(f"{name} must be a text or a list of at least one text, got {shorten(value)}")
    for text in texts:
        if not isinstance(text, str) or not is_valid_text(text):
            raise ValueError(f"{name} must be a text or a list of texts, got {shorten(ascii(text))}")
    return list(texts)


def check_finite(name: str, values: Any) -> None:
    """Raise ValueError for what isn't a tensor of floating point numbers, or holds NaN or an infinite one."""
    if not isinstance(values, Tensor) or not values.is_floating_point() or not values.isfinite().all():
        kind = f"a tensor of {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name} must be a tensor of finite floating point numbers, got {kind}")


def repeat_negatives(negative_prompt: str | Sequence[str] | None, count: int) -> list[str]:
    """Give each of `count` prompts its negative prompt."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        return list_texts("negative_prompt", negative_prompt or "") * count
    negatives = list_texts("negative_prompt", negative_prompt)
    if len(negatives) != count:
        raise ValueError(f"{len(negatives)} negative prompts for {count} prompts")
    return negatives

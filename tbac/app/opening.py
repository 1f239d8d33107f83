"""Opening a model as the options of a command say, and what training asks of the C library."""

import ctypes
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from tbac.app.making import make_part
from tbac.models.checks import check_precision

if TYPE_CHECKING:
    import torch

    from tbac.sampling import UniImagePipeline


def keep_freed_memory() -> None:
    """Let the C library keep the memory that a step frees for the next step, as PyTorch's CUDA allocator does.

    By default glibc returns large blocks to the system, which hands them out again page by page; a training step on a
    CPU spends a fifth of its time on that. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    # The numbers of M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX and M_TOP_PAD in glibc's malloc.h.
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1), (-2, 2**28)):
        mallopt(parameter, value)


def pick_device(name: str) -> "torch.device":
    """Pick a device; `auto` is CUDA where there is one.

    Raises:
        ValueError: for a device that this machine hasn't.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name}: torch finds {torch.cuda.device_count()} GPUs here; device=cpu needs none")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={name}: torch finds no such device here; device=cpu needs none")
    return device


def read_opening_options(cfg: DictConfig) -> dict[str, Any]:
    """Read the options of conf/opening/ as arguments of `open_model`: where the parts lie, and in which type."""
    connector = make_part(cfg.connector, "connector", partial=True) if cfg.connector else None
    names = [
        name for name in ("device", "dtype", "quantization", "mllm", "denoiser", "prompt_embeddings") if name in cfg
    ]
    return {name: cfg[name] for name in names} | {"connector": connector}


def open_model(
    path: str | None,
    device: str = "cpu",
    dtype: str = "float32",
    quantization: str | None = None,
    prompt_embeddings: str | None = None,
    **parts: Any,
) -> "UniImagePipeline":
    """Open an exported folder, a run folder, or a training checkpoint.

    Args:
        path: the folder or file.
        device: the device that the model is moved to; `auto` is CUDA if there is one, and the CPU otherwise.
        dtype: type of all weights.
        quantization: quantisation of the MLLM: `nf4`, `int8`, or None for the one that a checkpoint was trained with.
        prompt_embeddings: exported folder with the word embeddings for prompts, instead of the one that a checkpoint
            names; an export holds its own.
        parts: `mllm` and `denoiser`, folders or hub ids instead of those that the file names, and `connector`, the
            user's own, if the model was trained with one.

    Raises:
        ValueError: when there is no model at `path`, or it can't be opened.
    """
    from tbac.models import UniImage
    from tbac.sampling import UniImagePipeline

    if not path:
        raise ValueError("give checkpoint=PATH: an exported folder, a run folder of outputs/train, or a .ckpt file")
    check_precision("", dtype, quantization)
    chosen = pick_device(device)
    folder = Path(path).expanduser()
    is_export = (folder / "config.json").is_file()
    options = {"dtype": dtype, "quantization": quantization, **parts}
    if is_export:
        model = UniImage.from_pretrained(folder, **options)
    else:
        model = UniImage.from_checkpoint(folder, **options, prompt_embeddings=prompt_embeddings)
    pipeline = UniImagePipeline(model.to(chosen))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

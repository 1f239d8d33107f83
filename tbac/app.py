"""What the commands share: clear error messages, opening models, run folders.

Every command imports this file first. It imports neither torch nor a model library at the top, so that `--help` and a
mistake in the config are answered at once.
"""

import ctypes
import logging
import os
import platform
import re
import shlex
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tbac.models.config import check_precision

if TYPE_CHECKING:
    import torch

    from tbac.sampling import UniImagePipeline

log = logging.getLogger(__name__)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it warns that an optional package is missing
CONF = str(Path(__file__).resolve().parent.parent / "conf")  # absolute: commands run as files and as modules
USER_ERRORS = (ValueError, FileNotFoundError, HydraException, OmegaConfBaseException)


def name_point(overrides: str, limit: int = 120) -> str:
    """Name the folder of one job of a sweep by its overrides.

    Args:
        overrides: `key=value,…` as Hydra joins them; those that don't belong to the experiment are left out.
        limit: longest name in characters; a longer one is cut, and its digest is appended.
    """
    parts = re.split(r",(?=[\w./@~+-]+=)", overrides)
    ignored = ("machine", "logger", "debug", "callbacks", "trainer", "hydra", "sweep", "parent_run_id", "resume")
    distinguishing = [part for part in parts if re.split(r"[.=/@]", part.lstrip("+~"))[0] not in ignored]
    name = re.sub(r"[/\s]", "_", ",".join(distinguishing)) or "default"
    if len(name) <= limit:
        return name
    return f"{name[: limit - 9]}_{sha256(name.encode()).hexdigest()[:8]}"


def split_words(*texts: str | None) -> list[str]:
    """Split texts into words as a shell would, and return the words of all texts in one list; None has no words."""
    words = []
    for text in texts:
        words += shlex.split(text or "")
    return words


OmegaConf.register_new_resolver("point_name", name_point, replace=True)
OmegaConf.register_new_resolver("shell_words", split_words, replace=True)


def report_user_errors(main: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Decorate a command: a user's mistake ends it with one message and exit status 1.

    With TBAC_TRACEBACK=1 in the environment the traceback is shown instead.
    """

    @wraps(main)
    def guarded(cfg: DictConfig) -> Any:
        quiet_libraries()
        try:
            return main(cfg)
        except USER_ERRORS as error:
            cause = find_cause(error)
            if os.environ.get("TBAC_TRACEBACK") or not isinstance(cause, USER_ERRORS):
                raise
            print(f"error: {str(cause).strip()}", file=sys.stderr)
            sys.exit(1)

    return guarded


def find_cause(error: BaseException) -> BaseException:
    """Return the error that Hydra wrapped in one of its own."""
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def quiet_libraries() -> None:
    """Silence warnings of libraries that no user can act on."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    warnings.filterwarnings("ignore", message=".*Grad strides do not match.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec.*")
    warnings.filterwarnings("ignore", message=".*module.s. in eval mode at the start of training.*")
    for name in ("alembic", "mlflow", "torchao", "httpx", "lightning.pytorch.utilities.rank_zero", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


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


def get_run_folder() -> Path:
    """Return the run folder that Hydra made."""
    return Path(HydraConfig.get().runtime.output_dir)


def to_plain(cfg: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """Convert a config to built-in types, with interpolations resolved or left as they are written."""
    container = OmegaConf.to_container(cfg, resolve=resolve)
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}


def pick_device(name: str) -> "torch.device":
    """`auto` is CUDA where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def read_opening_options(cfg: DictConfig) -> dict[str, Any]:
    """Read the options of conf/opening/ as arguments of `open_model`: where the parts lie, and in which type."""
    connector = instantiate(cfg.connector) if cfg.connector else None
    names = [name for name in ("device", "dtype", "quantization", "mllm", "denoiser") if name in cfg]
    return {name: cfg[name] for name in names} | {"connector": connector}


def open_model(
    path: str | None,
    device: str = "cpu",
    dtype: str = "float32",
    quantization: str | None = None,
    mllm: str | None = None,
    denoiser: str | None = None,
    connector: Callable[..., Any] | None = None,
) -> "UniImagePipeline":
    """Open an exported folder, a run folder, or a training checkpoint.

    Args:
        path: the folder or file.
        device: the device that the model is moved to; `auto` is CUDA if there is one, and the CPU otherwise.
        dtype: type of all weights.
        quantization: quantisation of the MLLM: `nf4`, `int8`, or None for the one that a checkpoint was trained with.
        mllm: folder or hub id of the MLLM, instead of the one that the file names.
        denoiser: folder or hub id with the autoencoder, instead of the one that the file names.
        connector: the user's own connector, if the model was trained with one.

    Raises:
        ValueError: when there is no model at `path`, or it can't be opened.
    """
    from tbac.models import UniImage
    from tbac.sampling import UniImagePipeline

    if not path:
        raise ValueError("give checkpoint=PATH: an exported folder, a run folder of outputs/train, or a .ckpt file")
    check_precision("", dtype, quantization)
    folder = Path(path).expanduser()
    is_export = (folder / "config.json").is_file()
    load = UniImage.from_pretrained if is_export else UniImage.from_checkpoint
    model = load(folder, mllm, denoiser, dtype, quantization, connector)
    pipeline = UniImagePipeline(model.to(pick_device(device)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

"""What the commands share: clear errors, finding models, run folders.

Every command imports this first, so nothing here imports torch or a library of models before a config is checked:
`--help` and a mistake in the config are answered at once.
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
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as soon as it is imported it warns of an optional package
CONF = str(Path(__file__).resolve().parent.parent / "conf")  # absolute: applications run as files and as modules
USER_ERRORS = (ValueError, FileNotFoundError, HydraException, OmegaConfBaseException)


def name_point(overrides: str, limit: int = 120) -> str:
    """Name of the folder of a point of a sweep.

    Args:
        overrides: `key=value,…` as Hydra joins them; those that don't belong to the experiment are left out.
        limit: characters; a longer name is cut, and its digest added.
    """
    parts = re.split(r",(?=[\w./@~+-]+=)", overrides)
    groups = ("machine", "logger", "debug", "callbacks", "trainer", "hydra", "sweep", "parent_run_id", "resume")
    kept = [part for part in parts if re.split(r"[.=/@]", part.lstrip("+~"))[0] not in groups]
    name = re.sub(r"[/\s]", "_", ",".join(kept)) or "default"
    return name if len(name) <= limit else f"{name[: limit - 9]}_{sha256(name.encode()).hexdigest()[:8]}"


def split_words(*texts: str | None) -> list[str]:
    """The words that a shell would see in these texts, one after the other; None has none."""
    words = []
    for text in texts:
        words += shlex.split(text or "")
    return words


OmegaConf.register_new_resolver("point_name", name_point, replace=True)
OmegaConf.register_new_resolver("shell_words", split_words, replace=True)


def report_user_errors(main: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """End in one message and exit status 1 for a user's mistake; TBAC_TRACEBACK=1 shows where it was noticed."""

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
    """The error that a configuration library wrapped."""
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def quiet_libraries() -> None:
    """Silence notices that no user can act on."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    warnings.filterwarnings("ignore", message=".*Grad strides do not match.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec.*")
    warnings.filterwarnings("ignore", message=".*module.s. in eval mode at the start of training.*")
    for name in ("alembic", "mlflow", "torchao", "httpx", "lightning.pytorch.utilities.rank_zero", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next one, as PyTorch's CUDA allocator does.

    By default glibc returns large blocks to the system, which hands them out again page by page; a training step on a
    CPU spends a fifth of its time on that. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1), (-2, 2**28)):  # MMAP_MAX, TRIM, ARENA_MAX, TOP_PAD
        mallopt(parameter, value)


def get_run_folder() -> Path:
    """The run folder that Hydra made."""
    return Path(HydraConfig.get().runtime.output_dir)


def to_plain(cfg: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """The config as built-in types, interpolations resolved or as they are written."""
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
    """Where a command finds a model's parts and how it holds them: the options of conf/opening/, for `open_model`."""
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
        device: where the model is put; `auto` is CUDA where there is one.
        dtype: of all weights.
        quantization: of the MLLM: `nf4`, `int8`, or None for what a checkpoint was trained with.
        mllm: where to take the MLLM from instead of the place that the file names.
        denoiser: the same for the autoencoder.
        connector: the user's own, where the model was trained with one.

    Raises:
        ValueError: when nothing usable is there.
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
    return UniImagePipeline(model.to(pick_device(device)))

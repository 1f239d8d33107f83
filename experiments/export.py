"""Write an exported folder from a training checkpoint, and push it to the hub if asked.

python experiments/export.py checkpoint=outputs/train/… out=DIR [standalone=true] [push_to_hub=owner/name]
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from tbac.app import command, open_model, read_opening_options
from tbac.files import write_whole

if TYPE_CHECKING:
    from tbac.models.saved import SavedModel

log = logging.getLogger(__name__)


def check_options(cfg: DictConfig) -> None:
    """Raise ValueError for options that can be seen to be wrong before a weight is read."""
    from tbac.models.card import is_hub_id

    out = Path(cfg.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={cfg.out} exists and isn't an empty folder; give a new one")
    if cfg.push_to_hub and not is_hub_id(cfg.push_to_hub):
        raise ValueError(f"push_to_hub must be a hub id such as owner/name, got {cfg.push_to_hub!r}")


def read_facts(checkpoint: str) -> dict[str, Any]:
    """Read the rows of the model card that only a training checkpoint knows."""
    if (Path(checkpoint).expanduser() / "config.json").is_file():
        return {}
    from tbac.models.saved import FACTS, read_checkpoint

    read = read_checkpoint(checkpoint)
    return {"stage": read[FACTS]["stage"], "optimizer steps": read.get("global_step", "unknown")}


def read_adapted(cfg: DictConfig) -> "SavedModel":
    """Read the checkpoint of a model with adapters as it is, without merging them.

    Raises:
        ValueError: for an export, in which they are merged, and for a model without any.
    """
    from tbac.models.lora import has_adapters
    from tbac.models.saved import read_checkpoint, read_saved_model

    if (Path(cfg.checkpoint).expanduser() / "config.json").is_file():
        raise ValueError(f"adapter=true needs a training checkpoint; in the export {cfg.checkpoint} they are merged")
    connector = read_opening_options(cfg)["connector"]
    saved = read_saved_model(read_checkpoint(cfg.checkpoint, only_weights=True), cfg.checkpoint, connector)
    if not has_adapters(saved.config):
        raise ValueError(f"adapter=true: {cfg.checkpoint} was trained without model.lora.rank")
    return saved


def note_run(checkpoint: str, out: Path) -> None:
    """Note which MLflow run made the checkpoint, so that scores of the export go there too."""
    from tbac.training.tracking import RUN_ID, find_run_id

    run_id = find_run_id(Path(checkpoint))
    if run_id is not None:
        write_whole(out / RUN_ID, f"{run_id}\n".encode())


def push_to_hub(folder: Path, repository: str, private: bool) -> str:
    """Upload the folder; returns the address of the commit.

    Raises:
        ValueError: when the hub can't be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Export from tbac"))
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"push_to_hub={repository} failed ({type(error).__name__}: {str(error).splitlines()[0]}); the export in "
            f"{folder} is whole. Log in with `hf auth login` or set HF_TOKEN, then `hf upload {repository} {folder}`"
        ) from None


@command("export")
def main(cfg: DictConfig) -> None:
    check_options(cfg)
    adapted = read_adapted(cfg) if cfg.adapter else None
    model = open_model(cfg.checkpoint, **read_opening_options(cfg)).model
    out = Path(cfg.out)
    model.save_pretrained(out, standalone=cfg.standalone, notes=read_facts(cfg.checkpoint))
    if adapted is not None:
        from tbac.models.lora import write_adapters

        write_adapters(adapted, out)
    note_run(cfg.checkpoint, out)
    log.info("%s in %s", "the whole model" if cfg.standalone else "queries, connector and denoiser", out)
    if cfg.push_to_hub:
        log.info("pushed: %s", push_to_hub(out, cfg.push_to_hub, cfg.private))


if __name__ == "__main__":
    main()

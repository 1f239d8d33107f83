"""Turn the released checkpoint into an exported folder.

python experiments/import_official.py checkpoint=DIR mllm=DIR denoiser=DIR out=DIR [image_pixels=200704]
"""

import json
import logging
from pathlib import Path

from omegaconf import DictConfig

from tbac.app import command, get_run_folder

log = logging.getLogger(__name__)


@command("import_official")
def main(cfg: DictConfig) -> None:
    out = Path(cfg.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out={cfg.out} exists and isn't empty; give a new folder")
    from tbac.models.released import read_released  # torch and diffusers, only when `out` is right

    model, accounting = read_released(cfg.checkpoint, cfg.mllm, cfg.denoiser, cfg.image_pixels)
    model.save_pretrained(out, standalone=cfg.standalone)
    report = {"used": accounting.used, "dropped": accounting.dropped, "unused_rows": accounting.unused_rows}
    (get_run_folder() / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    log.info(
        "%d tensors used, %d equal to the base models' and dropped, %d rows of the embedding table unused: %s",
        len(accounting.used),
        len(accounting.dropped),
        accounting.unused_rows,
        out,
    )


if __name__ == "__main__":
    main()

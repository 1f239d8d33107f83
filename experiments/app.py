"""A page to draw, edit, ask, look into the ladder and compare checkpoints, on this machine's own address (make app).

python experiments/app.py checkpoint=PATH port=7860
"""

import os
from pathlib import Path

from omegaconf import DictConfig

from tbac.app import command, open_model, read_opening_options


@command("app")
def main(cfg: DictConfig) -> None:
    if not Path(cfg.checkpoint).expanduser().exists():
        raise ValueError(
            f"there is no model at checkpoint={cfg.checkpoint}: make demo makes outputs/demo/model, or give the path "
            "of an exported folder, a run folder or a .ckpt file"
        )
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when the library is imported
    from experiments.ui.page import build_page, serve
    from experiments.ui.studio import Studio

    options = read_opening_options(cfg)
    studio = Studio(open_model(cfg.checkpoint, **options), str(cfg.checkpoint), Path(cfg.out), options)
    if cfg.against:
        studio.open_other(cfg.against)
    defaults = {
        name: cfg[name] for name in ("num_inference_steps", "guidance_scale", "image_guidance_scale", "against")
    }
    serve(build_page(studio, list(cfg.examples), defaults), cfg.port, cfg.share, Path(cfg.out))


if __name__ == "__main__":
    main()

"""Ask the frozen MLLM.

python experiments/answer.py checkpoint=PATH 'question="what color is the circle?"' image=scene.png
"""

import hydra
from omegaconf import DictConfig

from tbac.app import CONF, open_model, read_opening_options, report_user_errors
from tbac.pictures import open_picture


@hydra.main(version_base="1.3", config_path=CONF, config_name="answer")
@report_user_errors
def main(cfg: DictConfig) -> None:
    image = open_picture(cfg.image, f"image {cfg.image}") if cfg.image else None
    print(open_model(cfg.checkpoint, **read_opening_options(cfg)).answer(cfg.question, image, cfg.max_new_tokens))


if __name__ == "__main__":
    main()

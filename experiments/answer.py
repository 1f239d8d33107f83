"""Ask the frozen MLLM.

python experiments/answer.py checkpoint=PATH 'question="what color is the circle?"' image=scene.png
"""

from omegaconf import DictConfig

from tbac.app import command, open_model, read_opening_options


@command("answer")
def main(cfg: DictConfig) -> None:
    from tbac.pictures import open_picture  # numpy and Pillow, only when the options are right

    image = open_picture(cfg.image, f"image {cfg.image}") if cfg.image else None
    print(open_model(cfg.checkpoint, **read_opening_options(cfg)).answer(cfg.question, image, cfg.max_new_tokens))


if __name__ == "__main__":
    main()

"""Ask the frozen MLLM.

python experiments/answer.py checkpoint=PATH 'question="what color is the circle?"' image=scene.png
"""

from typing import Any

from omegaconf import DictConfig

from tbac.app import command, open_model, read_opening_options

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed")


@command("answer")
def main(cfg: DictConfig) -> None:
    # Torch and transformers, only when the options are right.
    from transformers import TextStreamer

    from tbac.models.answering import AnswerOptions
    from tbac.pictures import open_picture

    sampling: dict[str, Any] = {name: cfg[name] for name in SAMPLING}
    AnswerOptions(cfg.max_new_tokens, **sampling)  # what doesn't go together is said before the model is read
    image = open_picture(cfg.image, f"image {cfg.image}") if cfg.image else None
    pipeline = open_model(cfg.checkpoint, **read_opening_options(cfg))
    streamer = None
    if cfg.stream:
        streamer = TextStreamer(pipeline.model.prompt.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = pipeline.answer(cfg.question, image, cfg.max_new_tokens, streamer, **sampling)
    if streamer is None:
        print(answer)


if __name__ == "__main__":
    main()

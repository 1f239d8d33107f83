"""Pictures from prompts: python experiments/generate.py checkpoint=PATH 'prompts=["a photo of a red circle"]'"""

import json
import logging
from pathlib import Path

from omegaconf import DictConfig

from tbac.app import command, open_model, read_opening_options
from tbac.files import expand_path, parse_json, read_lines, shorten
from tbac.pictures import open_picture

log = logging.getLogger(__name__)


def read_prompts(path: str) -> list[str]:
    """Read the prompts of a file: one a line, or JSON lines with `prompt`.

    Raises:
        ValueError: naming file and line, when it isn't of that form.
    """
    place = f"prompt_file={path}"
    file = expand_path(path, "prompt_file")
    if not file.exists():
        raise ValueError(f"{place} doesn't exist")
    lines = read_lines(file, place)
    # Each line is a prompt, unless the file's name says that it holds JSON lines.
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            prompts.append(line.strip())
            continue
        row = parse_json(line, f"{place}, line {number}")
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            given = shorten(line.strip())
            raise ValueError(f"{place}, line {number} needs a 'prompt' that is a string, got {given}")
        prompts.append(row["prompt"])
    if not prompts:
        raise ValueError(f"{place} holds no prompt")
    return prompts


@command("generate")
def main(cfg: DictConfig) -> None:
    # Prompts and images are checked before a model is loaded.
    prompts = list(cfg.prompts)
    if cfg.prompt_file:
        prompts += read_prompts(cfg.prompt_file)
    if not prompts:
        raise ValueError("nothing to draw: give prompts=[...] or prompt_file=PATH")
    images = [open_picture(path, f"image {path}") for path in cfg.images]
    if images and len(images) not in (1, len(prompts)):
        raise ValueError(
            f"images has {len(images)} entries for {len(prompts)} prompts; give none, one, or one per prompt"
        )
    import torch  # takes seconds, so only when the options are right

    # One image serves all prompts.
    sources = images * len(prompts) if len(images) == 1 else images
    pipeline = open_model(cfg.checkpoint, **read_opening_options(cfg))
    if cfg.compile:
        pipeline.model.denoiser.compile_blocks()
    pipeline.set_progress_bar_config(desc="denoising", leave=False)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    # Every picture has a seed that follows from its number, so that its noise is the same at any batch size.
    for start in range(0, len(prompts), cfg.batch_size):
        part = prompts[start : start + cfg.batch_size]
        count = len(part) * cfg.num_images_per_prompt
        first = start * cfg.num_images_per_prompt
        pictures = pipeline(
            part,
            image=sources[start : start + len(part)] or None,
            negative_prompt=cfg.negative_prompt,
            num_inference_steps=cfg.num_inference_steps,
            guidance_scale=cfg.guidance_scale,
            image_guidance_scale=cfg.image_guidance_scale,
            guidance_interval=tuple(cfg.guidance_interval),
            batch_branches=cfg.batch_branches,
            num_images_per_prompt=cfg.num_images_per_prompt,
            height=cfg.height,
            width=cfg.width,
            generator=[torch.Generator().manual_seed(cfg.seed + first + i) for i in range(count)],
        ).images
        for index, image in enumerate(pictures):
            image.save(out / f"{first + index:05d}.png")
    # The file says which prompt a picture was drawn from: `index` is the number of its first picture.
    rows = [{"prompt": p, "index": i * cfg.num_images_per_prompt} for i, p in enumerate(prompts)]
    (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log.info("%d pictures in %s", len(prompts) * cfg.num_images_per_prompt, out)


if __name__ == "__main__":
    main()

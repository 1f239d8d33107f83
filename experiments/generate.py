"""Pictures from prompts: python experiments/generate.py checkpoint=PATH 'prompts=["a photo of a red circle"]'"""

import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tbac.app import command, open_model, read_opening_options
from tbac.files import read_prompts

log = logging.getLogger(__name__)
SETTINGS = ("negative_prompt", "num_inference_steps", "guidance_scale", "image_guidance_scale", "height", "width")


def take_recipe(cfg: DictConfig) -> str:
    """Put what a picture was drawn from in the place of the options that decide a picture.

    Returns:
        The fingerprint of the model that drew it.

    Raises:
        ValueError: when the file doesn't say it, or the options name prompts or images as well.
    """
    from tbac.sampling.recipe import read_recipe

    if cfg.prompts or cfg.prompt_file or cfg.images:
        raise ValueError("from=PICTURE says what is drawn: give no prompts, prompt_file or images with it")
    recipe = read_recipe(cfg["from"])
    for name in (*SETTINGS, "guidance_interval", "seed"):
        cfg[name] = getattr(recipe, name)
    cfg.prompts, cfg.images, cfg.num_images_per_prompt = [recipe.prompt], list(recipe.images), 1
    return recipe.model


@command("generate")
def main(cfg: DictConfig) -> None:
    from tbac.pictures import open_picture  # numpy and Pillow, only when the options are right

    model = take_recipe(cfg) if cfg["from"] else None
    # Prompts and images are checked before a model is loaded.
    prompts = list(cfg.prompts)
    if cfg.prompt_file:
        prompts += read_prompts(cfg.prompt_file, "prompt_file")
    if not prompts:
        raise ValueError("nothing to draw: give prompts=[...] or prompt_file=PATH")
    images = [open_picture(path, f"image {path}") for path in cfg.images]
    if images and not model and len(images) not in (1, len(prompts)):
        raise ValueError(
            f"images has {len(images)} entries for {len(prompts)} prompts; give none, one, or one per prompt"
        )
    import torch  # takes seconds, so only when the options are right

    from tbac.sampling.recipe import Recipe, compute_fingerprint, save_picture

    inputs = [(str(path),) for path in cfg.images]
    inputs = inputs * len(prompts) if len(inputs) == 1 else inputs
    # One image serves all prompts.
    sources: list[Any] = images * len(prompts) if len(images) == 1 else images
    if model:  # all of them belong to the one picture
        sources, inputs = ([images], [tuple(cfg.images)]) if images else ([], [])
    pipeline = open_model(cfg.checkpoint, **read_opening_options(cfg))
    fingerprint = compute_fingerprint(pipeline.model)
    if model not in (None, fingerprint):
        raise ValueError(f"from={cfg['from']} was drawn by another model ({model}) than checkpoint={cfg.checkpoint}")
    if cfg.compile:
        pipeline.model.denoiser.compile_blocks()
    pipeline.set_progress_bar_config(desc="denoising", leave=False)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: cfg[name] for name in SETTINGS} | {"guidance_interval": tuple(cfg.guidance_interval)}
    # Every picture has a seed that follows from its number, so that its noise is the same at any batch size.
    for start in range(0, len(prompts), cfg.batch_size):
        part = prompts[start : start + cfg.batch_size]
        count = len(part) * cfg.num_images_per_prompt
        first = start * cfg.num_images_per_prompt
        pictures = pipeline(
            part,
            image=sources[start : start + len(part)] or None,
            batch_branches=cfg.batch_branches,
            num_images_per_prompt=cfg.num_images_per_prompt,
            **settings,
            generator=[torch.Generator().manual_seed(cfg.seed + first + i) for i in range(count)],
        ).images
        for index, image in enumerate(pictures):
            number = first + index
            prompt = prompts[number // cfg.num_images_per_prompt]
            paths = inputs[number // cfg.num_images_per_prompt] if inputs else ()
            recipe = Recipe(prompt, paths, seed=cfg.seed + number, model=fingerprint, **settings)
            save_picture(image, out / f"{number:05d}.png", recipe)
    # The file says which prompt a picture was drawn from: `index` is the number of its first picture.
    rows = [{"prompt": p, "index": i * cfg.num_images_per_prompt} for i, p in enumerate(prompts)]
    (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log.info("%d pictures in %s", len(prompts) * cfg.num_images_per_prompt, out)


if __name__ == "__main__":
    main()

"""The model card of an exported folder."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tbac.models.taps import TapPlan

FILES = {
    False: "The frozen MLLM and autoencoder aren't in here; they are read from the places named below.",
    True: "The frozen MLLM and autoencoder are in `mllm/` and `denoiser/vae/`, so this folder loads without network.",
}


def is_hub_id(source: str) -> bool:
    """Whether a source names a hub repository rather than a folder."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return source.count("/") == 1 and not source.startswith((".", "~"))


def make_model_card(config: dict[str, Any], sources: list[str], standalone: bool, notes: Mapping[str, Any]) -> str:
    """Write the text of an export's `README.md`.

    Args:
        config: its `config.json`.
        sources: where MLLM and denoiser came from; hub ids become the card's base models.
        standalone: whether the frozen parts are in the folder.
        notes: more rows for the table, such as the stage and its steps.
    """
    # The hub reads this block to file the model under its kind and its base models.
    data = ModelCardData(
        library_name="tbac",
        pipeline_tag="any-to-any",
        license="apache-2.0",
        base_model=[s for s in sources if is_hub_id(s)] or None,
        tags=["text-to-image", "image-to-image", "ladder-side-diffusion-tuning"],
    )
    # The table says what the model is made of, and by which digests its frozen parts are known.
    rows = {
        "MLLM": config["mllm"],
        "denoiser": config["denoiser"],
        "queries": config["num_queries"],
        "taps, block by block": TapPlan.from_dict(config["taps"]).describe(),
        "connector": config["ladder"]["connector"],
        "area of input images": f"{config['image_pixels']} pixels",
        "longest prompt": f"{config['max_text_tokens']} tokens",
        **{f"sha256 of {part}": digest for part, digest in config["frozen_digests"].items()},
        "tbac": config["tbac_version"],
        **notes,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
{data.to_yaml()}
---

# UniImage

A frozen multimodal LLM reads the prompt and learnable queries; what the queries hold at several of its layers
conditions the blocks of a diffusion transformer ([arXiv 2508.08098](https://arxiv.org/abs/2508.08098)).
`model.safetensors` holds queries, connector and denoiser. {FILES[standalone]}

```python
from tbac.sampling import UniImagePipeline

pipe = UniImagePipeline.from_pretrained("path/to/this/folder")
pipe("a red bicycle leaning on a brick wall").images[0].save("bicycle.png")
pipe.answer("what is in the picture?", image)
```

| | |
| --- | --- |
{table}

What it generates follows its training data, with that data's biases; it can draw what is false or harmful, and text in
pictures, crowded scenes and the parts of a picture that an edit should leave alone are its known weak spots.
"""

"""What a picture was drawn from, kept in the PNG file itself, so that it can be drawn again."""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from tbac.files import write_whole
from tbac.models import UniImage
from tbac.pictures import check_size

KEY = "tbac"  # of the text chunk in the PNG


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a picture.

    Attributes:
        prompt: the text.
        images: paths of the input images, of an edit.
        negative_prompt: what the unconditional branch reads.
        seed: of a `torch.Generator` on the CPU.
        num_inference_steps: solver steps.
        guidance_scale: text guidance.
        image_guidance_scale: image guidance, of an edit.
        guidance_interval: noise levels between which there is guidance.
        height: pixels, or None for the model's own size.
        width: as `height`.
        model: `compute_fingerprint` of the model.
    """

    prompt: str
    images: tuple[str, ...] = ()
    negative_prompt: str = ""
    seed: int = 42
    num_inference_steps: int = 30
    guidance_scale: float = 4.5
    image_guidance_scale: float = 1.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    height: int | None = None
    width: int | None = None
    model: str = ""

    def to_arguments(self) -> dict[str, Any]:
        """Return the arguments of a call of the pipeline, without texts, images and generator."""
        left_out = ("prompt", "images", "negative_prompt", "seed", "model")
        return {name: value for name, value in vars(self).items() if name not in left_out}


def compute_fingerprint(model: UniImage) -> str:
    """Compute by what a model is told from others: sixteen hexadecimal digits.

    It covers names, shapes and some values of every trained tensor, and the frozen parts' digests. It doesn't notice
    damage; a checkpoint's digest does.
    """
    digest = sha256(json.dumps(model.provenance.digests, sort_keys=True).encode())
    for name, tensor in sorted(model.get_trained_state().items()):
        few = tensor.flatten()[:16].float().cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + few)
    return digest.hexdigest()[:16]


def save_picture(image: Image.Image, path: Path, recipe: Recipe) -> None:
    """Write a PNG with its recipe; the same picture and recipe give the same bytes."""
    facts, buffer = PngInfo(), io.BytesIO()
    facts.add_itxt(KEY, json.dumps(asdict(recipe), ensure_ascii=False))
    image.save(buffer, "PNG", pnginfo=facts)
    write_whole(path, buffer.getvalue())


def read_recipe(path: str | Path) -> Recipe:
    """Read what a picture was drawn from.

    Raises:
        ValueError: when the file can't be read as a picture, holds no recipe, or one with values of other types.
    """
    try:
        with Image.open(Path(path).expanduser(), formats=["PNG"]) as image:
            check_size(image.size, str(path))
            image.load()
            text = getattr(image, "text", {}).get(KEY)
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a PNG ({error})") from None
    if text is None:
        raise ValueError(f"{path} doesn't say what it was drawn from: it wasn't drawn by generate.py or the app")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    names = {field.name for field in fields(Recipe)}
    if not isinstance(values, Mapping) or set(values) != names:
        raise ValueError(f"{path}: what it was drawn from must name {', '.join(sorted(names))}")
    return Recipe(**{name: _check(path, name, value) for name, value in values.items()})


def _check(path: str | Path, name: str, value: Any) -> Any:
    """One value of a recipe in a file, which may hold anything."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in ("prompt", "negative_prompt", "model"):
        right = isinstance(value, str)
    elif name == "images":
        right = isinstance(value, list) and all(isinstance(one, str) for one in value)
        value = tuple(value) if right else value
    elif name == "guidance_interval":
        right = isinstance(value, list) and len(value) == 2 and all(isinstance(one, int | float) for one in value)
        value = tuple(value) if right else value
    elif name in ("height", "width"):
        right = value is None or (number and isinstance(value, int) and value > 0)
    elif name in ("seed", "num_inference_steps"):
        right = number and isinstance(value, int) and 0 <= value < 2**63
    else:
        right = number and abs(value) < 1e6
    if not right:
        raise ValueError(f"{path}: {name} of what it was drawn from can't be {value!r:.60}")
    return value

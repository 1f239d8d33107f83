"""What a picture was drawn from stands in its file, and is read back as data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tbac.models import UniImage
from tbac.sampling.recipe import KEY, Recipe, compute_fingerprint, read_recipe, save_picture
from tests.helpers.pictures import make_noise_image

RECIPE = Recipe("ein rotes 猫 \n 'x' $y", ("a.png",), "bad", 7, 3, 2.5, 1.0, (0.1, 0.9), 32, None, "abc")


def write_png(path: Path, text: str | None) -> Path:
    facts = PngInfo()
    if text is not None:
        facts.add_itxt(KEY, text)
    make_noise_image(1).save(path, "PNG", pnginfo=facts)
    return path


def test_a_recipe_is_read_back(tmp_path: Path) -> None:
    save_picture(make_noise_image(1), tmp_path / "a.png", RECIPE)
    save_picture(make_noise_image(1), tmp_path / "b.png", RECIPE)
    assert read_recipe(tmp_path / "a.png") == RECIPE
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.tobytes() == make_noise_image(1).tobytes()


VALUES = json.loads(json.dumps({**vars(RECIPE)}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "doesn't say what it was drawn from"),
        ("", "must name"),
        ("{", "must name"),
        ("[" * 5000, "must name"),
        ("[]", "must name"),
        (json.dumps(VALUES | {"more": 1}), "must name"),
        *((json.dumps(VALUES | {name: value}), name) for name, value in [
            ("prompt", 5), ("images", "a.png"), ("images", [1]), ("seed", -1), ("seed", True), ("seed", 2**70),
            ("num_inference_steps", 1.5), ("guidance_scale", "x"), ("guidance_scale", float("nan")),
            ("guidance_interval", [0]), ("height", 0), ("width", "a"), ("model", None),
        ]),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_recipe(write_png(tmp_path / "a.png", text))


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n1234"])
def test_what_isn_t_a_png_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="can't be read as a PNG"):
        read_recipe(tmp_path / "a.png")
    with pytest.raises(ValueError, match="can't be read as a PNG"):
        read_recipe(tmp_path / "missing.png")


def test_a_model_is_told_from_another(model: UniImage) -> None:
    first = compute_fingerprint(model)
    assert first == compute_fingerprint(model)
    with torch.no_grad():
        model.ladder.queries[0, 0] += 1
    assert compute_fingerprint(model) != first


def test_every_setting_is_an_argument_of_the_pipeline() -> None:
    import inspect

    from tbac.sampling import UniImagePipeline

    accepted: Any = inspect.signature(UniImagePipeline.__call__).parameters
    assert RECIPE.to_arguments().keys() <= accepted.keys()

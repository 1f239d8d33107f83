"""Prompts as the model reads them."""

import pytest

from tbac.models import UniImage
from tbac.models.prompt import IMAGE_PAD, SYSTEM_PROMPT
from tests.conftest import noise_image


def decoded(model: UniImage, *args: object, **options: object) -> list[str]:
    inputs = model.prompt(*args, **options)  # type: ignore[arg-type]
    ids = [row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    return model.prompt.tokenizer.batch_decode(ids)


def test_the_chat_form_is_the_released_one(model: UniImage) -> None:
    expected = (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\na red circle<|im_end|>\n"
        "<|im_start|>assistant\n<|vision_start|>"
    )
    assert decoded(model, ["a red circle"]) == [expected]


def test_images_come_before_the_text_with_one_token_per_merged_patch(model: UniImage) -> None:
    text = decoded(model, ["go"], [[noise_image(0), noise_image(1)]])[0]
    picture = "<|vision_start|>" + IMAGE_PAD * 9 + "<|vision_end|>"
    assert f"<|im_start|>user\n{picture}{picture}go<|im_end|>" in text


@pytest.mark.parametrize("size", [(32, 32), (200, 20), (7, 90), (1, 1)])
def test_images_of_any_size_and_mode_get_about_the_same_area(model: UniImage, size: tuple[int, int]) -> None:
    for mode in ("RGB", "L", "RGBA", "P", "1"):
        inputs = model.prompt(["x"], [[noise_image(0, size).convert(mode)]])
        pixels = int(inputs["image_grid_thw"].prod()) * 16
        assert 512 <= pixels <= 2048
        image_token = model.mllm.model.config.image_token_id
        assert int((inputs["input_ids"] == image_token).sum()) == int(inputs["image_grid_thw"].prod()) // 4


@pytest.mark.parametrize("look_alike", ["<|im_end|>", "<|image_pad|>", "<|vision_start|>x", "\n<|im_start|>system"])
def test_look_alikes_of_special_tokens_stay_text(model: UniImage, look_alike: str) -> None:
    tokenizer = model.prompt.tokenizer
    plain = model.prompt(["ab"])["input_ids"][0].tolist()
    with_it = model.prompt([f"a{look_alike}b"])["input_ids"][0].tolist()
    special = set(tokenizer.all_special_ids)
    assert [i for i in with_it if i in special] == [i for i in plain if i in special]
    assert f"a{look_alike}b" in tokenizer.decode(with_it)


def test_long_texts_are_cut(model: UniImage) -> None:
    ids = model.prompt.text_ids("red circle " * 400)
    assert len(ids) == 256
    assert ids == model.prompt.tokenizer("red circle " * 400)["input_ids"][:256]


def test_padding_side(model: UniImage) -> None:
    right = model.prompt(["a", "a red circle"])["attention_mask"]
    left = model.prompt(["a", "a red circle"], padding_side="left")["attention_mask"]
    assert right[0, 0] == 1
    assert right[0, -1] == 0
    assert left[0, 0] == 0
    assert left[0, -1] == 1


def test_counts_and_types_are_checked(model: UniImage) -> None:
    with pytest.raises(ValueError, match="2 texts but 1 lists of images"):
        model.prompt(["a", "b"], [None])
    with pytest.raises(ValueError, match="must be strings, got int"):
        model.prompt([3])  # type: ignore[list-item]

"""Prompts as the model reads them."""

from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from tbac.models import UniImage
from tbac.models.prompt import IMAGE_PAD, SYSTEM_PROMPT, PromptProcessor
from tests.helpers.configs import ROOT
from tests.helpers.pictures import make_noise_image, make_prompt_cases


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
    text = decoded(model, ["go"], [[make_noise_image(0), make_noise_image(1)]])[0]
    picture = "<|vision_start|>" + IMAGE_PAD * 9 + "<|vision_end|>"
    assert f"<|im_start|>user\n{picture}{picture}go<|im_end|>" in text


@pytest.mark.parametrize("size", [(32, 32), (200, 20), (7, 90), (1, 1)])
def test_images_of_any_size_and_mode_get_about_the_same_area(model: UniImage, size: tuple[int, int]) -> None:
    for mode in ("RGB", "L", "RGBA", "P", "1"):
        inputs = model.prompt(["x"], [[make_noise_image(0, size).convert(mode)]])
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
    ids = model.prompt.tokenize_text("red circle " * 400)
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


BASE = ROOT / "tests" / "released" / "base" / "Qwen2.5-VL-tiny"
TEXTS = {
    "short": "a red circle",
    "empty": "",
    "leading newlines": "\n\n  a red circle",
    "trailing space": "a red circle  \n",
    "other scripts": "ein rotes Ölgemälde, 赤い円, красный круг 🟥",
    "decomposed": "cafe\u0301 au lait",
    "long": "a photo of a red car next to a blue bench, " * 40,
    "long, cut within a letter": "赤い円🟥と青い四角🟦" * 40,
    "long, cut within a word": "antidisestablishmentarianism" * 60,
}
SIZES = [(32, 32), (448, 448), (1000, 300), (31, 2000), (5, 7), (449, 447), (2048, 1536), (1, 1)]


@pytest.fixture(scope="module")
def released() -> PromptProcessor:
    return PromptProcessor.from_pretrained(BASE, image_pixels=256 * 28 * 28)


def plain_processor(processor: PromptProcessor, text: str, images: list[Image.Image]) -> dict[str, Any]:
    """What the released processor does, by the library's tokenizer and image processor: the text is cut by tokens and
    decoded, the template is filled with it, image pads are multiplied, and all is read as one string."""
    tokenizer = processor.tokenizer
    cut = tokenizer.decode(tokenizer(text)["input_ids"][:256])
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": cut}]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]},
        {"role": "user", "content": content},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + "<|vision_start|>"
    vision: dict[str, Any] = {}
    if images:
        area = 256 * 28 * 28
        vision = Qwen2VLImageProcessorPil.from_pretrained(BASE, min_pixels=area, max_pixels=area)(
            images=images, return_tensors="pt"
        )
        for grid in vision["image_grid_thw"]:
            whole = whole.replace(IMAGE_PAD, "<|placeholder|>" * (int(grid.prod()) // 4), 1)
        whole = whole.replace("<|placeholder|>", IMAGE_PAD)
    return {"input_ids": tokenizer(whole)["input_ids"], **vision}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_tokens_pixels_and_grids_are_the_released_processor_s(released: PromptProcessor, name: str, count: int) -> None:
    images = [make_noise_image(7, (300, 200)), make_noise_image(8, (90, 400))][:count]
    ours = released([TEXTS[name]], [images])
    theirs = plain_processor(released, TEXTS[name], images)
    assert ours["input_ids"][0].tolist() == theirs["input_ids"]
    for key in ("pixel_values", "image_grid_thw") if images else ():
        assert torch.equal(ours[key], theirs[key])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA"])
def test_images_of_any_size_and_mode_are_read_as_released(
    released: PromptProcessor, size: tuple[int, int], mode: str
) -> None:
    image = make_noise_image(1, size).convert(mode)
    ours = released([""], [[image]])
    theirs = plain_processor(released, "", [image.convert("RGB")])
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert ours["input_ids"][0].tolist() == theirs["input_ids"]


def test_a_sliver_is_refused(released: PromptProcessor) -> None:
    with pytest.raises(ValueError, match="has 1 x 201 pixels; one side may be at most 200 times the other"):
        released([""], [[make_noise_image(0, (1, 201))]])


@pytest.mark.parametrize("look_alike", ["<|img0|>", "<|pad_token_0|>", "<|vision_end|>", "<|image_pad|>"])
def test_no_text_injects_a_query_or_an_image(released: PromptProcessor, look_alike: str) -> None:
    plain = released(["a circle"])["input_ids"][0].tolist()
    ids = released([f"a {look_alike} circle"])["input_ids"][0].tolist()
    special = set(released.tokenizer.convert_tokens_to_ids(released.tokenizer.all_special_tokens))
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert look_alike in released.tokenizer.decode(ids)


@pytest.mark.parametrize("case", ["text", "one_image", "several_images", "mixed"])
def test_positions_are_the_library_s(model: UniImage, case: str) -> None:
    inputs = model.prompt(*make_prompt_cases()[case])
    mask = inputs["attention_mask"].bool()
    kinds = (inputs["input_ids"] == model.mllm.model.config.image_token_id).int()
    if "image_grid_thw" in inputs:
        expected = model.mllm.body.get_rope_index(
            inputs["input_ids"], kinds, inputs["image_grid_thw"], attention_mask=inputs["attention_mask"]
        )[0]
    else:
        expected = (mask.long().cumsum(-1) - 1).expand(3, -1, -1)
    assert torch.equal(inputs["position_ids"][:, mask], expected[:, mask])


def test_all_prompts_begin_with_the_shared_tokens_and_go_on_in_their_own_way(released: PromptProcessor) -> None:
    inputs = released(["a red circle", "\n\nnewlines", ""], [None, None, [make_noise_image(0)]])
    shared = inputs["shared_ids"].tolist()
    assert all(row[: len(shared)] == shared for row in inputs["input_ids"].tolist())
    text = released.tokenizer.decode(shared)
    assert text == f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>"
    assert released(["x"], system="other")["shared_ids"].tolist() != shared

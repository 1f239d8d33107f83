"""GenEval's detector: its steps on numbers made by hand, and the whole of it on tiny random models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from tbac.evaluation.detectors.base import Detection
from tbac.evaluation.detectors.mask2former import (
    COLORS,
    Mask2FormerDetector,
    find_instances,
    prepare_picture,
    resize_masks,
)
from tests.helpers.pictures import make_noise_image

pytestmark = pytest.mark.xdist_group("mask2former")  # the detector is built once


def test_a_detection_is_a_query_and_a_class() -> None:
    classes = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]))  # dog, cat, nothing
    masks = torch.full((2, 6, 8), -10.0)
    masks[0, 1:3, 2:7] = 2.0
    found, kept = find_instances(classes, masks, ["dog", "cat"])
    certainty = torch.tensor(2.0).sigmoid().item()
    assert [(d.name, d.box) for d in found] == [("dog", (2, 1, 7, 3)), ("cat", (2, 1, 7, 3))]  # the other mask is empty
    assert [d.score for d in found] == pytest.approx([0.7 * certainty, 0.2 * certainty], rel=1e-4)
    assert kept.shape == (2, 6, 8)
    assert kept[0].sum() == 10
    assert find_instances(classes, torch.full((2, 6, 8), -1.0), ["dog", "cat"])[0] == []


def test_the_best_hundred_are_kept_in_the_order_of_their_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    classes, masks = torch.randn(40, 6, generator=generator), torch.randn(40, 16, 16, generator=generator)
    found, kept = find_instances(classes, masks, list("abcde"))
    assert len(found) == len(kept) == 100
    scores = [d.score for d in found]
    assert scores == sorted(scores, reverse=True)


def test_masks_are_of_the_picture_alone_and_at_its_resolution() -> None:
    logits = torch.full((1, 8, 8), -5.0)
    logits[:, :4, :4] = 5.0  # the upper left quarter of the padded input
    made = resize_masks(logits, (64, 64), (32, 48), (100, 150)) > 0
    assert made.shape == (1, 100, 150)
    assert made[0, :90, :90].all()
    assert not made[0, :, 115:].any()


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((90, 50), (53, 96), (64, 96)),
        ((50, 90), (96, 53), (96, 64)),
        ((40, 40), (64, 64), (64, 64)),
        ((64, 65), (65, 64), (96, 64)),
    ],
)
def test_pictures_keep_their_ratio_and_are_padded_to_multiples_of_32(
    size: tuple[int, int], resized: tuple[int, int], padded: tuple[int, int]
) -> None:
    processor = Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    image = make_noise_image(3, size)
    made = prepare_picture(image, processor)
    assert (made.resized, made.pixels.shape[-2:]) == (resized, padded)
    height, width = resized
    assert not made.pixels[..., height:, :].any()
    assert not made.pixels[..., width:].any()
    # What holds the picture is the picture: where nothing is resized, to the bit.
    if image.size[::-1] == resized:
        kept = torch.tensor(np.array(image)).permute(2, 0, 1)
        mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
        torch.testing.assert_close(made.pixels[0, :, :height, :width], (kept / 255 - mean) / deviation)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, world_folder: Path) -> tuple[str, str]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judges")
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=12,
        id2label={0: "dog", 1: "mouse", 2: "remote"},
    )  # fmt: skip
    segmenter, clip = folder / "segmenter", folder / "clip"
    Mask2FormerForUniversalSegmentation(config).save_pretrained(segmenter)
    Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(segmenter)
    tokenizer = AutoTokenizer.from_pretrained(world_folder / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.pad_token_id, "bos_token_id": 0}
    vision = {**small, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(clip)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(clip)
    tokenizer.save_pretrained(clip)
    return str(segmenter), str(clip)


def test_the_whole_detector_reads_a_picture(folders: tuple[str, str]) -> None:
    detector = Mask2FormerDetector(*folders, device="cpu")
    assert detector.object_names == ["dog", "computer mouse", "tv remote"]  # GenEval's names
    detector.thresholds = type(detector.thresholds)()  # untrained models are never certain
    picture = make_noise_image(1, (50, 90))
    scan = detector(picture, {"dog"})
    assert scan.detections
    for detection in scan.detections:
        left, top, right, bottom = detection.box
        assert 0 <= left < right <= 50
        assert 0 <= top < bottom <= 90
        assert (detection.color in COLORS) == (detection.name == "dog")
    assert detector(picture, {"dog"}) == scan


def test_colors_are_of_the_masked_crop(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    detector = Mask2FormerDetector(*folders, device="cpu")
    seen: list[Image.Image] = []
    processor = detector.clip_processor

    def look(images: list[Image.Image], **options: object) -> object:
        seen.extend(images)
        return processor(images=images, **options)

    monkeypatch.setattr(detector, "clip_processor", look)
    picture = Image.new("RGB", (40, 30), "red")
    mask = torch.zeros(30, 40, dtype=torch.bool)
    mask[10:20, 5:15] = True
    with torch.no_grad():
        assert detector.name_color(picture, Detection("dog", "", (5, 5, 15, 20), 1.0), mask) in COLORS
    pixels = np.asarray(seen[0])
    assert pixels.shape == (15, 10, 3)
    assert (pixels[:5] == 0x99).all()
    assert (pixels[5:] == (255, 0, 0)).all()


def test_absent_weights_are_named(folders: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"judge\.segmenter=nobody/nothing: no such local folder"):
        Mask2FormerDetector("nobody/nothing", folders[1])

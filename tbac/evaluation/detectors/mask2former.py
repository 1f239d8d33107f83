"""GenEval's detector for real pictures: Mask2Former finds objects, CLIP names their colours.

Pictures are resized and padded, and masks are made at the picture's full resolution, in the same steps as in the
original (mmdetection): transformers stretches pictures that aren't square, and its post-processing works on small masks
and drops boxes.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
)

from tbac.evaluation.detectors.base import Detection, Scan
from tbac.evaluation.detectors.coco import name_classes
from tbac.evaluation.judges.base import JudgeFacts
from tbac.evaluation.protocol import compute_weights_digest
from tbac.evaluation.rules import GENEVAL_THRESHOLDS
from tbac.models.sources import locate_folder
from tbac.pictures import to_upright_rgb

MODEL_FILES = ("*.json", "*.safetensors", "*.txt")
MAX_DETECTIONS = 100  # of all classes, before any threshold
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")  # GenEval's
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BEHIND = "#999"  # gray that replaces the background of an object before CLIP names its colour
PADDED_TO = 32  # the sides of the model's input are multiples of this many pixels


@dataclass(frozen=True)
class DetectorInput:
    """A picture as the segmenter reads it.

    Attributes:
        pixels: (1, 3, height, width), normalised, with zeros to the right of the picture and below it.
        resized: (height, width) of the part that holds the picture.
    """

    pixels: Tensor
    resized: tuple[int, int]


def prepare_picture(image: Image.Image, processor: Mask2FormerImageProcessorPil) -> DetectorInput:
    """Resize a picture to the processor's sides with its ratio kept, normalise and pad it, as mmdetection does.

    Args:
        image: RGB.
        processor: holds shortest and longest side, mean and deviation of the colours.
    """
    # The shorter side gets its length unless the longer one would be too long; both are rounded.
    width, height = image.size
    short, long = processor.size["shortest_edge"], processor.size["longest_edge"]
    scale = min(short / min(width, height), long / max(width, height))
    resized = int(height * scale + 0.5), int(width * scale + 0.5)
    pixels = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)[None]
    # OpenCV, which mmdetection resizes with, doesn't blur what it makes smaller, and returns whole numbers.
    pixels = interpolate(pixels, resized, mode="bilinear", align_corners=False).round()
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    pixels = (pixels / 255 - mean) / deviation
    below, right = (-side % PADDED_TO for side in resized)
    return DetectorInput(pad(pixels, (0, right, 0, below)), resized)


def resize_masks(logits: Tensor, padded: tuple[int, int], resized: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resize mask logits to the resolution of the picture.

    Args:
        logits: (query, height, width), at the resolution of the model's output.
        padded: (height, width) of the model's input.
        resized: (height, width) of the part of the input that holds the picture; the rest is padding.
        size: (height, width) of the picture.

    Returns:
        (query, height, width).
    """
    with_padding = interpolate(logits[None], padded, mode="bilinear", align_corners=False)
    without_padding = with_padding[..., : resized[0], : resized[1]]
    return interpolate(without_padding, size, mode="bilinear", align_corners=False)[0]


def find_instances(classes: Tensor, masks: Tensor, names: Sequence[str]) -> tuple[list[Detection], Tensor]:
    """Find the objects in the model's output.

    A detection is a pair of a query and a class. Its score is the probability of the class times the mean probability
    of the pixels within the mask. Detections with an empty mask are left out.

    Args:
        classes: logits (query, class + 1); the last one means "no object".
        masks: logits (query, height, width), at the resolution of the picture.
        names: of the classes.

    Returns:
        The detections, without colours, the best first; and their masks (detection, height, width).
    """
    # One query may stand for several classes, so the best pairs are chosen among all of them.
    probabilities = classes.softmax(-1)[:, :-1]
    best = probabilities.flatten().topk(min(MAX_DETECTIONS, probabilities.numel()))
    queries = best.indices // probabilities.shape[1]
    labels = (best.indices % probabilities.shape[1]).tolist()
    # A mask that is uncertain about its pixels lowers the score of its class.
    inside = masks > 0
    certainty = (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    scores = best.values * certainty[queries]
    # The box is the smallest one around the mask; without a mask there is none.
    detections, kept_masks = [], []
    for index in scores.argsort(descending=True).tolist():
        mask = inside[queries[index]]
        if not mask.any():
            continue
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box = (columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1)
        detections.append(Detection(names[labels[index]], "", box, scores[index].item()))
        kept_masks.append(mask)
    return detections, torch.stack(kept_masks) if kept_masks else inside[:0]


class Mask2FormerDetector:
    """Objects by Mask2Former with COCO's classes, colours by CLIP on the masked crop.

    Args:
        segmenter: folder or hub id of a Mask2Former for instance segmentation.
        clip: folder or hub id of a CLIP.
        device: where they run; `auto` is CUDA where there is one.

    Attributes:
        object_names: of its classes, as GenEval calls them.

    Raises:
        ValueError: when there are no such weights, or their classes can't be told.
    """

    thresholds = GENEVAL_THRESHOLDS

    def __init__(self, segmenter: str, clip: str, device: str = "auto") -> None:
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        folder: Path = locate_folder("judge.segmenter", segmenter, MODEL_FILES)
        self._weights = [compute_weights_digest(folder)]
        self.processor = Mask2FormerImageProcessorPil.from_pretrained(folder)
        self.segmenter = Mask2FormerForUniversalSegmentation.from_pretrained(folder).to(self.device).eval()
        labels = self.segmenter.config.id2label
        self.object_names = name_classes([labels[i] for i in range(len(labels))], f"judge.segmenter={segmenter}")
        folder = locate_folder("judge.clip", clip, MODEL_FILES)
        self.clip_processor = CLIPImageProcessorPil.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.clip = CLIPModel.from_pretrained(folder).to(self.device).eval()
        self.identity = f"Mask2Former {segmenter} and CLIP {clip}"
        self._weights.append(compute_weights_digest(folder))
        self._classifiers: dict[str, Tensor] = {}

    def describe_facts(self) -> JudgeFacts:
        """Describe the two models by the digests of their weights, and the thresholds."""
        settings = f"thresholds {self.thresholds.score} and {self.thresholds.counting}"
        return JudgeFacts("Mask2Former and CLIP", " and ".join(self._weights), settings)

    @torch.no_grad()
    def __call__(self, image: Image.Image, colored: Collection[str] = ()) -> Scan:
        """Read one picture; only objects whose name is in `colored` get a colour. The background has no name."""
        image = to_upright_rgb(image)
        prepared = prepare_picture(image, self.processor)
        outputs = self.segmenter(pixel_values=prepared.pixels.to(self.device))
        height, width = prepared.pixels.shape[-2:]
        masks = resize_masks(
            outputs.masks_queries_logits[0].float(), (height, width), prepared.resized, image.size[::-1]
        )
        instances, instance_masks = find_instances(outputs.class_queries_logits[0].float(), masks, self.object_names)
        # CLIP takes most of the time, so it only looks at objects whose colour matters and that count at all.
        detections = []
        for detection, mask in zip(instances, instance_masks, strict=True):
            if detection.name in colored and detection.score > self.thresholds.score:
                detection = replace(detection, color=self.name_color(image, detection, mask))
            detections.append(detection)
        return Scan("", tuple(detections))

    def name_color(self, image: Image.Image, detection: Detection, mask: Tensor) -> str:
        """Name the colour of an object, with CLIP on its box, in which everything outside of its mask is gray."""
        cut = Image.fromarray(mask.cpu().numpy().astype(np.uint8) * 255)
        alone = Image.composite(image, Image.new("RGB", image.size, BEHIND), cut).crop(detection.box)
        pixels = self.clip_processor(images=[alone], return_tensors="pt")["pixel_values"].to(self.device)
        features = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)
        return COLORS[int((normalize(features) @ self._compute_classifier(detection.name)).argmax())]

    def _compute_classifier(self, name: str) -> Tensor:
        """Compute for each colour the mean of the templates' text features, or return it if that was done before.

        Returns:
            (feature, colour).
        """
        if name not in self._classifiers:
            columns = []
            for color in COLORS:
                texts = [template.format(color=color, name=name) for template in TEMPLATES]
                tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
                features = self.clip.text_projection(self.clip.text_model(**tokens).pooler_output)
                columns.append(normalize(normalize(features).mean(0), dim=0))
            self._classifiers[name] = torch.stack(columns, dim=1)
        return self._classifiers[name]

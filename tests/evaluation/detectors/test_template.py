"""The exact detector on the closed world."""

from random import Random

import torch
from PIL import Image

from data_prep.shapes.samples import scene_to_json
from data_prep.shapes.scene import render, sample_scene
from tbac.evaluation.benchmarks.edits import parse_scan
from tbac.evaluation.detectors.base import Scan
from tbac.evaluation.detectors.template import TemplateDetector


def said(scan: Scan) -> tuple:
    return scan.background, sorted((d.name, d.color, d.box) for d in scan.detections)


def test_the_detector_is_exact_on_what_the_world_draws(detector: TemplateDetector) -> None:
    rng = Random(11)
    for _ in range(300):
        scene = sample_scene(rng)
        assert said(detector(render(scene))) == said(parse_scan(scene_to_json(scene)))


def test_the_detector_stands_noise_and_finds_nothing_in_noise_alone(detector: TemplateDetector) -> None:
    rng, generator = Random(12), torch.Generator().manual_seed(0)
    for _ in range(50):
        scene = sample_scene(rng)
        pixels = torch.tensor(list(render(scene).tobytes())).view(24, 24, 3)
        noisy = (pixels + 12 * torch.randn(24, 24, 3, generator=generator)).clamp(0, 255).byte()
        assert said(detector(Image.fromarray(noisy.numpy()))) == said(parse_scan(scene_to_json(scene)))
    noise = torch.randint(0, 256, (24, 24, 3), dtype=torch.uint8, generator=generator)
    assert detector(Image.fromarray(noise.numpy())).detections == ()

"""The exact detector of pictures drawn from a known palette and known glyphs: the judge of closed worlds.

It is built from the `world.json` that such a world ships.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from tbac.evaluation.detectors.base import Detection, Scan
from tbac.files import read_json
from tbac.pictures import to_upright_rgb


class TemplateDetector:
    """Finds the nearest palette colour of each pixel, then connected components, then the glyph that overlaps best.

    Args:
        colors: name -> (red, green, blue) in 0..255 of object colours.
        backgrounds: the same for background colours.
        glyphs: name -> boolean mask (height, width), all of one size.
        min_overlap: least intersection over union with a glyph at which a component counts as that object.
    """

    def __init__(
        self,
        colors: dict[str, tuple[int, int, int]],
        backgrounds: dict[str, tuple[int, int, int]],
        glyphs: dict[str, np.ndarray],
        min_overlap: float = 0.7,
    ) -> None:
        self.color_names = list(colors)
        self.background_names = list(backgrounds)
        self.palette = np.array([*colors.values(), *backgrounds.values()], np.float32)
        self.object_names = list(glyphs)
        self.min_overlap = min_overlap
        masks = [np.asarray(g, bool) for g in glyphs.values()]
        if len({m.shape for m in masks}) != 1:
            raise ValueError(f"glyphs must have one size, got {sorted({m.shape for m in masks})}")
        # With one pixel of margin, a glyph can be moved by one pixel against the component.
        self.glyphs = np.stack([np.pad(m, 1) for m in masks])

    @classmethod
    def from_world(cls, path: str | Path) -> "TemplateDetector":
        """Build from a world's `world.json` (fields `colors`, `backgrounds`, `glyphs` as rows of '#' and '.')."""
        world = read_json(Path(path), kind=dict)
        glyphs = {name: np.array([list(row) for row in rows]) == "#" for name, rows in world["glyphs"].items()}
        return cls(world["colors"], world["backgrounds"], glyphs)

    def _classify(self, component: np.ndarray) -> tuple[int, float]:
        """Find the glyph that overlaps a component best, moved by up to one pixel; returns index and overlap."""
        height, width = self.glyphs.shape[1:]
        canvas = np.zeros((height + 2, width + 2), bool)
        h, w = component.shape
        if h > height or w > width:
            return 0, 0.0
        # The component is put in the middle, then every glyph is compared with it at nine shifts.
        top, left = (height + 2 - h) // 2, (width + 2 - w) // 2
        canvas[top : top + h, left : left + w] = component
        best = (0, 0.0)
        for dy in range(3):
            for dx in range(3):
                window = canvas[dy : dy + height, dx : dx + width]
                inside = (self.glyphs & window).sum((1, 2))
                union = self.glyphs.sum((1, 2)) + component.sum() - inside
                overlap = inside / union
                index = int(overlap.argmax())
                if overlap[index] > best[1]:
                    best = (index, float(overlap[index]))
        return best

    def __call__(self, image: Image.Image, colored: Collection[str] = ()) -> Scan:
        """Read one picture of any mode, without resizing it. All objects get their colour, whatever `colored` says."""
        # The nearest colour of the palette tells for each pixel which object colour or background it has.
        pixels = np.asarray(to_upright_rgb(image), np.float32)
        distance = ((pixels[:, :, None] - self.palette) ** 2).sum(-1)
        nearest = distance.argmin(-1)
        num_colors = len(self.color_names)
        counts = np.bincount(nearest.ravel(), minlength=len(self.palette))[num_colors:]
        # Touching pixels of one colour are one object, if they look like a glyph.
        detections = []
        for index, color in enumerate(self.color_names):
            labels, _ = ndimage.label(nearest == index)
            for label, region in enumerate(ndimage.find_objects(labels), start=1):
                glyph, overlap = self._classify(labels[region] == label)
                if overlap >= self.min_overlap:
                    rows, columns = region
                    box = (columns.start, rows.start, columns.stop, rows.stop)
                    detections.append(Detection(self.object_names[glyph], color, box, overlap))
        return Scan(self.background_names[int(counts.argmax())], tuple(detections))

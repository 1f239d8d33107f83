"""Aspect-ratio buckets: sizes that targets are cropped to, one for each batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tbac.data.order import Draw
from tbac.data.sizes import target_sizes

# SANA's table in sixteenths of the nominal side, (height, width): 40 shapes of about the same area, from 1:4 to 4:1.
# Source: ASPECT_RATIO_512 and ASPECT_RATIO_1024 of SANA's trainer.
SANA = (
    (8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21),
    (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16), (16, 15), (17, 15),
    (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11), (23, 11), (24, 10), (25, 10), (26, 9),
    (27, 9), (28, 9), (29, 8), (30, 8), (31, 8), (32, 8),
)  # fmt: skip


@dataclass(frozen=True)
class Buckets:
    """Sizes to crop to; a picture goes to the one whose aspect ratio is nearest to its own.

    Args:
        sizes: (height, width) in pixels of each.

    Raises:
        ValueError: when there is none, a side isn't positive, or two have one aspect ratio.
    """

    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.sizes or any(min(size) < 1 for size in self.sizes):
            raise ValueError(f"data.buckets must list sizes of at least one pixel a side, got {list(self.sizes)}")
        if len(set(self.ratios.tolist())) < len(self.sizes):
            raise ValueError(f"data.buckets lists two sizes of one aspect ratio: {list(self.sizes)}")

    @cached_property
    def ratios(self) -> np.ndarray:
        """Height over width of each, to two decimals as in SANA's table."""
        return np.array([round(height / width, 2) for height, width in self.sizes])

    def listed(self) -> list[list[int]]:
        """The sizes as JSON has them."""
        return [list(size) for size in self.sizes]

    def nearest(self, sizes: np.ndarray) -> np.ndarray:
        """Index of the bucket of each size.

        Args:
            sizes: (picture, 2), height and width; in any unit. Where it is unknown (0) the squarest bucket is chosen.
        """
        heights, widths = sizes[:, 0], sizes[:, 1]
        known = (heights > 0) & (widths > 0)
        ratios = np.where(known, heights / np.where(known, widths, 1), 1.0)
        return np.abs(self.ratios[None] - ratios[:, None]).argmin(axis=1)


def parse_buckets(value: str | Sequence[Sequence[int]] | None, image_size: int) -> Buckets | None:
    """Buckets of a config.

    Args:
        value: None for squares of `image_size` alone, `sana` for its table around that side, or (height, width) pairs.
        image_size: pixels.

    Raises:
        ValueError: for anything else.
    """
    if value is None:
        return None
    if value == "sana":
        if image_size % 16:
            raise ValueError(f"data.buckets=sana needs a stage.image_size that 16 divides, got {image_size}")
        unit = image_size // 16
        return Buckets(tuple((height * unit, width * unit) for height, width in SANA))
    pairs: Any = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if not pairs or not all(
        isinstance(pair, Sequence) and len(pair) == 2 and all(type(side) is int for side in pair) for pair in pairs
    ):
        raise ValueError(f"data.buckets must be null, sana, or a list of [height, width] in pixels; got {value!r}")
    return Buckets(tuple((height, width) for height, width in pairs))


class BucketIndex:
    """The bucket of each sample of some sources, from what their shards say of its size.

    Args:
        buckets: see above.
        shards: per source, its tars.
        use_latents: go by cached latents where there are any.
    """

    def __init__(self, buckets: Buckets, shards: Sequence[Sequence[Path]], use_latents: bool = True) -> None:
        self.sizes = buckets.sizes

        @lru_cache(maxsize=4096)
        def of_shard(source: int, shard: int) -> np.ndarray:
            return buckets.nearest(target_sizes(shards[source][shard], use_latents)).astype(np.int16)

        self._of_shard: Callable[[int, int], np.ndarray] = of_shard

    def __call__(self, draw: Draw) -> int:
        """Index of the bucket of a draw; 0 for one that its shard doesn't hold, which reading will report."""
        known = self._of_shard(draw.source, draw.shard)
        return int(known[draw.sample]) if draw.sample < len(known) else 0

"""Classes of detectors: known by their place, whatever a converted checkpoint calls them."""

import pytest

from tbac.evaluation.detectors.coco import GENEVAL_NAMES, name_classes
from tests.helpers.published import locate_published

# What transformers' converted 80-class checkpoints say at these places.
CONVERTED = {
    3: "motorbike", 4: "aeroplane", 57: "sofa", 58: "pottedplant", 60: "diningtable", 62: "tvmonitor", 64: "mouse",
    65: "remote", 66: "keyboard",
}  # fmt: skip


def test_the_names_are_the_published_ones_in_their_order() -> None:
    assert list(GENEVAL_NAMES) == locate_published("geneval/object_names.txt").read_text().splitlines()


@pytest.mark.parametrize(
    "labels",
    [
        [CONVERTED.get(i, name) for i, name in enumerate(GENEVAL_NAMES)],
        [name.upper() for name in GENEVAL_NAMES],
        [f"LABEL_{i}" for i in range(80)],
    ],
)
def test_eighty_classes_are_known_by_their_place(labels: list[str]) -> None:
    assert name_classes(labels, "judge.segmenter=x") == list(GENEVAL_NAMES)
    stuff = [f"LABEL_{i}" for i in range(80, 133)]  # a panoptic detector has more, after these
    assert name_classes([*labels, *stuff], "judge.segmenter=x")[:80] == list(GENEVAL_NAMES)


def test_another_order_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"judge\.segmenter=x: class 0 is called 'airplane', where COCO's order has"):
        name_classes(sorted(GENEVAL_NAMES), "judge.segmenter=x")

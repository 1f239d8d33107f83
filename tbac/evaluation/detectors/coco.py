"""The 80 classes of COCO in their order, by GenEval's names, whatever a converted detector calls them."""

from collections.abc import Sequence

# Their order is COCO's, which every detector of 80 classes keeps; the names are those of GenEval's object_names.txt.
GENEVAL_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
# What GenEval calls otherwise: the first three in COCO itself, the others in converted checkpoints.
OTHER_NAMES = {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "motorbike": "motorcycle",
    "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
    "tvmonitor": "tv",
}  # fmt: skip


def name_classes(labels: Sequence[str], place: str) -> list[str]:
    """Name the classes of a detector as GenEval does.

    Args:
        labels: of the detector's classes, in its order.
        place: option and checkpoint, for messages.

    Raises:
        ValueError: for a detector of 80 classes or more whose labels say that they aren't in COCO's order.
    """
    names = [OTHER_NAMES.get(label.strip().lower(), label.strip().lower()) for label in labels]
    if len(labels) < len(GENEVAL_NAMES):
        return names
    # Classes are known by their place; a label only has a say where it names another class.
    for index, expected in enumerate(GENEVAL_NAMES):
        if names[index] != expected and names[index] in GENEVAL_NAMES:
            raise ValueError(
                f"{place}: class {index} is called {labels[index]!r}, where COCO's order has {expected!r}; the classes "
                "of a detector must be in this order"
            )
    return [*GENEVAL_NAMES, *names[len(GENEVAL_NAMES) :]]

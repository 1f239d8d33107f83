"""Recognizes captions in the form of GenEval's prompts. Whoever trains on them has to say so beside a GenEval score."""

import re

COCO = (  # as GenEval names them
    "person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|"
    "parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|"
    "suitcase|frisbee|skis|snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|"
    "tennis racket|bottle|wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|"
    "hot dog|pizza|donut|cake|chair|couch|potted plant|bed|dining table|toilet|tv|laptop|computer mouse|"
    "tv remote|computer keyboard|cell phone|microwave|oven|toaster|sink|refrigerator|book|clock|vase|scissors|"
    "teddy bear|hair drier|toothbrush"
)
COLORS = "red|orange|yellow|green|blue|purple|pink|brown|black|white"
_OBJECT = rf"(?:an? )?(?:(?:{COLORS}) )?(?:{COCO})"
GENEVAL = re.compile(
    rf"a photo of (?:{_OBJECT}(?: (?:and|left of|right of|above|below) {_OBJECT})?|"
    rf"(?:two|three|four) (?:(?:{COCO})(?:e?s)?|people|knives|sheep|skis|scissors|benches|buses|zebras))\.?",
    re.IGNORECASE,
)


def is_geneval_template(caption: str) -> bool:
    """Whether a caption has the form of GenEval's prompts."""
    return GENEVAL.fullmatch(caption.strip()) is not None

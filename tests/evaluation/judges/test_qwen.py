"""A judge that runs on this machine."""

from pathlib import Path

import pytest

from tbac.evaluation.judges.qwen import QwenJudge
from tests.helpers.pictures import make_noise_image


def test_a_local_model_answers(in_world: Path) -> None:
    mllm = str(in_world / "backbones" / "mllm")
    local = QwenJudge(mllm, device="cpu", dtype="float32", image_pixels=576, max_new_tokens=4)
    said = local.ask("is there a circle?", [make_noise_image(1), make_noise_image(2)])
    assert said == local.ask("is there a circle?", [make_noise_image(1), make_noise_image(2)])
    assert said != local.ask("is there a circle?", [make_noise_image(3)])
    assert mllm in local.identity
    with pytest.raises(ValueError, match=r"judge\.mllm=absent: no such folder"):
        QwenJudge("absent")
    with pytest.raises(ValueError, match="dtype must be one of"):
        QwenJudge(mllm, dtype="int4")

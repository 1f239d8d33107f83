"""Makes reading any weight an error, for tests of what is refused before that."""

import pytest

READERS = (
    "transformers.Qwen2_5_VLModel.from_pretrained",
    "transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained",
    "tbac.models.weights.WeightFiles.read",
    "tbac.models.weights.WeightFiles.compute_digest",
    "diffusers.SanaTransformer2DModel.from_pretrained",
    "diffusers.AutoencoderDC.from_pretrained",
)


def refuse_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every function that reads weights raise, as an error of ours."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    for target in READERS:
        monkeypatch.setattr(target, refuse)

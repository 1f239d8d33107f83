"""Import and export as their users run them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file

from experiments.studies.faults.runs import are_identical
from tbac.models import UniImage
from tbac.models.saved import read_checkpoint
from tbac.sampling import UniImagePipeline
from tests.helpers.commands import FEW, run_app, run_to_message, run_to_success
from tests.helpers.configs import ROOT
from tests.helpers.pictures import make_noise_image
from tests.helpers.worlds import load_all_parts

pytestmark = pytest.mark.usefixtures("in_world")
RELEASED = ROOT / "tests" / "released"
IMPORT = [
    f"checkpoint={RELEASED}/checkpoint",
    f"mllm={RELEASED}/base/Qwen2.5-VL-tiny",
    f"denoiser={RELEASED}/base/Sana-tiny",
]

EXPORTED = ["README.md", "config.json", "model", "model.safetensors", "model_index.json", "pipeline.py", "scheduler"]


def test_the_released_checkpoint_becomes_a_folder_that_draws_and_answers(capfd: pytest.CaptureFixture[str]) -> None:
    text = run_to_success("import_official", capfd, *IMPORT, "out=imported", "image_pixels=3136", "hydra.run.dir=run")
    assert "136 tensors used, 277 equal to the base models' and dropped, 2 rows" in text
    report = json.loads(Path("run/report.json").read_text())
    assert sorted(report["used"] + report["dropped"]) == sorted(load_file(RELEASED / "checkpoint/model.safetensors"))
    config = json.loads(Path("imported/config.json").read_text())
    assert Path(config["mllm"]).is_absolute()  # found from everywhere
    assert (config["num_queries"], config["image_pixels"], config["taps"]["layers"]) == (16, 3136, [2, 3, 4, 5, 6, 7])
    pipe = UniImagePipeline.from_pretrained("imported")
    assert pipe("a dog", num_inference_steps=2).images[0].size == (192, 192)
    assert isinstance(pipe.answer("what is it?", make_noise_image(1), 3), str)


def test_an_import_is_refused_before_it_overwrites(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("there").mkdir()
    Path("there/file").touch()
    assert "out=there exists and isn't empty" in run_to_message("import_official", capfd, *IMPORT, "out=there")
    missing = [IMPORT[0], "mllm=/nowhere", IMPORT[2]]
    assert "error: mllm=/nowhere: no such folder" in run_to_message("import_official", capfd, *missing, "out=new")
    assert not Path("new").exists()


@pytest.mark.parametrize("standalone", [False, True])
def test_a_checkpoint_s_export_loads_bit_for_bit(
    in_world: Path, capfd: pytest.CaptureFixture[str], standalone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = shutil.copytree(in_world, Path("world").absolute())  # one that can be taken away
    monkeypatch.setenv("TBAC_SHAPES", str(world))
    run_to_success("train", capfd, *FEW, "hydra.run.dir=run")
    run_to_success("export", capfd, "checkpoint=run", "out=out", f"standalone={standalone}")
    model = UniImage.from_pretrained("out")
    assert are_identical(model.get_trained_state(), read_checkpoint("run")["state_dict"])
    model.save_pretrained("again", standalone=standalone)
    again, first = (load_all_parts(m).state_dict() for m in (UniImage.from_pretrained("again"), model))
    assert are_identical(first, again)
    assert Path("out/mllm/model.safetensors").is_file() == standalone
    if standalone:
        original = world / "backbones" / "mllm" / "model.safetensors"
        assert Path("out/mllm/model.safetensors").read_bytes() == original.read_bytes()
        world.rename(world.with_name("away"))
        pipe = UniImagePipeline.from_pretrained("out")
        assert pipe("a red circle", num_inference_steps=1).images[0].size == (24, 24)
        assert isinstance(pipe.answer("what is it?", make_noise_image(1), 3), str)
    card = ModelCard.load("out/README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("tbac", "any-to-any")
    assert "| stage | t2i_pretrain |" in card.text
    assert "| optimizer steps | 2 |" in card.text


@pytest.mark.usefixtures("trained_run")
def test_training_starts_from_an_exported_folder(capfd: pytest.CaptureFixture[str]) -> None:
    run_to_success("export", capfd, "checkpoint=run", "out=out")
    run_to_success("train", capfd, *FEW, "hydra.run.dir=two", "stage.lr=1e-30", "stage.min_lr=0", "init=out")
    first, second = (read_checkpoint(f)["state_dict"] for f in ("run", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-6, atol=1e-7)


def test_training_from_the_imported_release_needs_its_word_embeddings(capfd: pytest.CaptureFixture[str]) -> None:
    run_to_success("import_official", capfd, *IMPORT, "out=imported", "image_pixels=3136")
    options = [
        *FEW,
        f"model.mllm={RELEASED}/base/Qwen2.5-VL-tiny",
        f"model.denoiser={RELEASED}/base/Sana-tiny",
        "model.num_queries=16",
        "model.query_phrases=null",
        "model.image_pixels=3136",
        "data.use_latents=false",
        "stage.image_size=192",
        "init=imported",
    ]
    assert "give model.prompt_embeddings=imported as well" in run_to_message("train", capfd, *options)
    run_to_success(
        "train", capfd, *options, "model.prompt_embeddings=imported", "hydra.run.dir=run", "stage=ti2i_pretrain"
    )
    facts = read_checkpoint("run")["tbac"]
    assert set(facts["frozen"]) == {"mllm", "autoencoder", "prompt_embeddings"}


@pytest.mark.usefixtures("trained_run")
def test_pushing_uploads_the_folder(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: asked.append((name, options)))
    monkeypatch.setattr(
        HfApi,
        "upload_folder",
        lambda self, **options: (
            asked.append(sorted(p.name for p in Path(options["folder_path"]).iterdir())) or "address"
        ),
    )
    text = run_to_success("export", capfd, "checkpoint=run", "out=out", "push_to_hub=owner/name")
    assert "pushed: address" in text
    assert asked == [
        ("owner/name", {"private": True, "exist_ok": True}),
        EXPORTED,
    ]


@pytest.mark.usefixtures("trained_run")
def test_a_hub_that_can_t_be_reached_leaves_the_export_whole(capfd: pytest.CaptureFixture[str]) -> None:
    text = run_to_message("export", capfd, "checkpoint=run", "out=out", "push_to_hub=owner/name")
    assert "push_to_hub=owner/name failed (OfflineModeIsEnabled" in text
    assert UniImage.from_pretrained("out").ladder.queries.shape == (9, 96)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["checkpoint=/nowhere", "out=out"], "doesn't exist"),
        (["checkpoint=/nowhere", "out=."], "out=. exists"),
        (["checkpoint=x", "out=out", "push_to_hub=not a name"], "push_to_hub must be a hub id"),
    ],
)
def test_bad_exports_are_refused(capfd: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    Path("file").touch()
    assert words in run_to_message("export", capfd, *options)
    assert run_app("export", capfd, *options)[0] == 1

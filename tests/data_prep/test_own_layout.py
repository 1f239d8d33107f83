"""A layout that isn't in the package is converted by its name in a YAML."""

import json
from pathlib import Path

import pytest

from tbac.data.decoding import decode_sample
from tbac.data.tars import TarReader
from tests.helpers.commands import run_app
from tests.helpers.pictures import make_noise_image

LAYOUT = """
from pathlib import Path

from data_prep.shards.conversion import Record, Rejected


class Lines:
    \"\"\"`captions.tsv` with a file and its caption in each line.\"\"\"

    name, expected = "lines", 3

    def __init__(self, path, upper=False):
        self.root, self.upper = Path(path), upper

    def list_units(self):
        return ["captions.tsv"]

    def read(self, unit, scratch):
        for line in (self.root / unit).read_text().splitlines():
            file, caption = line.split("\\t")
            if not (self.root / file).is_file():
                yield Rejected(file, "no picture")
                continue
            text = caption.upper() if self.upper else caption
            yield Record(Path(file).stem, {"png": (self.root / file).read_bytes(), "txt": text.encode()})
"""


def test_a_layout_of_ones_own_is_used_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_layouts.py").write_text(LAYOUT)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_conf" / "dataset").mkdir(parents=True)
    yaml = "_target_: my_layouts.Lines\npath: ???\nupper: false\n"
    (tmp_path / "my_conf" / "dataset" / "lines.yaml").write_text(yaml)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "captions.tsv").write_text("a.png\ta cat\nb.png\ta dog\nc.png\tgone\n")
    for i, name in enumerate("ab"):
        make_noise_image(i).save(tmp_path / "raw" / f"{name}.png")
    status, text = run_app(
        "data_prep.convert", capfd, "--config-dir", str(tmp_path / "my_conf"), "dataset=lines", "dataset.path=raw",
        "dataset.upper=true", "out=out", "processes=1", "options.val_samples=0",
    )  # fmt: skip
    assert status == 0, text
    assert "rejected             1  no picture, such as c.png" in text
    reader = TarReader()
    samples = [decode_sample(reader.read(Path("out/train-000000.tar"), i)) for i in range(2)]
    assert [(sample.key, sample.text) for sample in samples] == [("a", "A CAT"), ("b", "A DOG")]
    written = reader.read(Path("out/train-000000.tar"), 0)["png"]
    assert written == (tmp_path / "raw" / "a.png").read_bytes()
    assert json.loads(Path("out/manifest.json").read_text())["provenance"] == {"dataset": "lines"}

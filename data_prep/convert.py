"""Converts a dataset, published or your own, into shards: python data_prep/convert.py dataset=NAME dataset.path=…"""

import logging
import shlex
from pathlib import Path

from omegaconf import DictConfig

from tbac.app import CONF, check_members, command, make_part

log = logging.getLogger(__name__)


@command("convert")
def main(cfg: DictConfig) -> None:
    if "dataset" not in cfg:
        known = sorted(file.stem for file in (Path(CONF) / "dataset").glob("*.yaml"))
        raise ValueError(f"name the layout of the dataset, dataset={'|'.join(known)}, or a YAML of your own")

    # Imported here, so that --help doesn't wait for what decodes pictures.
    from data_prep.shards.conversion import convert, format_counts

    options = make_part(cfg.options, "options")
    dataset = make_part(cfg.dataset, "dataset", _convert_="all")
    check_members(dataset, ("name", "expected", "list_units", "read"), "dataset")
    out = Path(cfg.out).absolute()
    counts = convert(dataset, out, options, cfg.processes)
    print(f"\n{dataset.name} in {out}:\n{format_counts(counts)}")
    sources = f"stage.sources=[{{path: {cfg.out}}}]"
    validation = f"stage.val_sources=[{{path: {cfg.out}, split: val}}]"
    if counts.written.get("val"):
        share = counts.written["val"] / counts.total
        print(f"{share:.1%} of them are for validation (options.val_share, options.val_samples).")
        print(f"To train on them: {shlex.join([sources, validation])}")
    if counts.expected is not None and counts.read != counts.expected:
        log.warning("%s has %d samples; %d were found", dataset.name, counts.expected, counts.read)


if __name__ == "__main__":
    main()

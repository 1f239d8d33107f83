"""Checks every sample of a folder of shards: python data_prep/verify.py path=DIR, or make shards-verify DIR=…

Exits with status 1 when training would refuse something, or something isn't as the manifest says.
"""

import logging
import sys
from pathlib import Path

from omegaconf import DictConfig

from tbac.app import command, get_run_folder

log = logging.getLogger(__name__)


@command("verify")
def main(cfg: DictConfig) -> None:
    folder = Path(cfg.path)
    if not folder.is_dir():
        raise ValueError(f"path={cfg.path} isn't a folder of shards")
    if not (cfg.samples or cfg.write_sizes):
        raise ValueError("samples=false and write_sizes=false leave nothing to do")

    # Imported here, so that --help and a wrong path don't wait for what decodes pictures.
    from data_prep.shards.report import write_report
    from data_prep.shards.sheet import draw_sheet
    from data_prep.shards.verification import verify, write_all_sizes

    if cfg.write_sizes:
        write_all_sizes(folder, cfg.processes)
    if not cfg.samples:
        return
    facts = verify(folder, cfg.tokenizer, cfg.processes)
    out = get_run_folder()
    text = write_report(facts, folder, "tokens" if cfg.tokenizer else "words", out)
    print(f"\n{text}\nThe report is {out / 'report.md'}.")
    shown = draw_sheet(folder, out / "samples.png")
    if shown:
        print(f"{shown} of the samples, sources beside targets: {out / 'samples.png'}")
    if facts.faults:
        log.error("%d faults of %d kinds", facts.faults.total(), len(facts.faults))
        sys.exit(1)


if __name__ == "__main__":
    main()

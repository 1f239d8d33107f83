"""Look at every sample of a folder of shards: python data_prep/verify.py path=DIR, or make shards-verify DIR=…

Exits with status 1 when something would be refused, or isn't as the manifest says.
"""

import logging
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import hydra
from omegaconf import DictConfig
from tqdm import tqdm
from transformers import AutoTokenizer

from data_prep.shards.verification import Facts, as_json, histograms, look_at, report_table, shards_of
from tbac.app import CONF, output_dir, user_errors
from tbac.data.buckets import write_sizes

log = logging.getLogger(__name__)


def count_words(text: str) -> int:
    """Words of a text."""
    return len(text.split())


class TokenCounter:
    """Tokens of a text, by a tokenizer that each process opens for itself.

    Args:
        source: folder or hub id of the tokenizer.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._tokenizer = None

    def __getstate__(self) -> dict:
        return {"source": self.source, "_tokenizer": None}

    def __call__(self, text: str) -> int:
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self.source)
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[misc]


def verify(folder: Path, tokenizer: str | None, processes: int) -> Facts:
    """Look at all shards of a folder."""
    tars, listed = shards_of(folder)
    facts = Facts()
    for name in sorted(set(listed) - {tar.name for tar in tars}):
        facts.fault("a shard that is in the manifest and absent", name)
    look = partial(_look, listed=listed, count_tokens=TokenCounter(tokenizer) if tokenizer else count_words)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        found = map(look, tars) if processes == 1 else pool.map(look, tars)
        for own in tqdm(found, total=len(tars), unit="shard"):
            facts.add(own)
    return facts


def write_all_sizes(folder: Path, processes: int) -> None:
    """Write the sizes of targets beside all shards of a folder, from their headers."""
    tars, _ = shards_of(folder)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        counts = list(tqdm(pool.map(write_sizes, tars), total=len(tars), unit="shard", desc="reading sizes"))
    log.info("%s: the sizes of %d samples in %d shards are kept beside them", folder, sum(counts), len(tars))


def _look(tar: Path, listed: dict, count_tokens: Callable[[str], int]) -> Facts:
    logger = logging.getLogger("tbac.data.tars")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it passes over is in the report
    try:
        return look_at(tar, listed.get(tar.name), count_tokens)
    finally:
        logger.setLevel(level)


@hydra.main(version_base="1.3", config_path=CONF, config_name="verify")
@user_errors
def main(cfg: DictConfig) -> None:
    folder = Path(cfg.path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"path={cfg.path} isn't a folder of shards")
    if cfg.processes < 1:
        raise ValueError(f"processes must be at least 1, got {cfg.processes}")
    if not (cfg.samples or cfg.write_sizes):
        raise ValueError("samples=false and write_sizes=false leave nothing to do")
    if cfg.write_sizes:
        write_all_sizes(folder, cfg.processes)
    if not cfg.samples:
        return
    facts = verify(folder, cfg.tokenizer, cfg.processes)
    out, unit = output_dir(), "tokens" if cfg.tokenizer else "words"
    histograms(facts, unit, out / "histograms.png")
    (out / "report.json").write_text(as_json(facts) + "\n")
    lines = [f"# Shards of {folder}", "", "| what | |", "| --- | ---: |"]
    lines += [f"| {name} | {value} |" for name, value in report_table(facts, unit)]
    if facts.geneval:
        lines += ["", "A GenEval score after training on captions of its own templates must say so. Some of them:", ""]
        lines += [f"- {name}" for name in facts.geneval_named]
    if facts.faults:
        lines += ["", "| fault | number | such as |", "| --- | ---: | --- |"]
        lines += [f"| {kind} | {n:,} | {'; '.join(facts.named[kind][:3])} |" for kind, n in facts.faults.most_common()]
    lines += ["", "![histograms](histograms.png)"]
    text = "\n".join(lines) + "\n"
    (out / "report.md").write_text(text)
    print(f"\n{text}\nThe report is {out / 'report.md'}.")
    if facts.faults:
        log.error("%d faults of %d kinds", facts.faults.total(), len(facts.faults))
        sys.exit(1)


if __name__ == "__main__":
    main()

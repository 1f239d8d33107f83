"""Making the benchmark of a config, without torch: what is wrong with it is said at once."""

from omegaconf import DictConfig

from tbac.app import make_part
from tbac.evaluation.benchmarks.answers import Answers
from tbac.evaluation.benchmarks.base import PictureBenchmark


def make_benchmark(cfg: DictConfig) -> PictureBenchmark | Answers:
    """Make the benchmark that a config of `evaluate.py` names; it reads its files.

    Raises:
        ValueError: for options or files that can't be used, and for a class that isn't a benchmark.
    """
    benchmark = make_part(cfg.benchmark, "benchmark")
    if not isinstance(benchmark, PictureBenchmark | Answers):
        raise ValueError(f"benchmark._target_={cfg.benchmark._target_} isn't derived from PictureBenchmark")
    return benchmark

"""Score a model: python experiments/evaluate.py checkpoint=PATH benchmark=NAME

NAME is a YAML of `conf/benchmark/`. A benchmark of pictures has three steps, which go on where they stopped when `out`
is the same folder: `generate` writes the tree that the benchmark's own scorer reads, on any number of processes
(`torchrun`, `srun`); `score` judges what is there; `report` writes `report.json`, `report.md` and `report.html`, and
logs the scores to the checkpoint's MLflow run. `answers` draws nothing and has no steps.
"""

from omegaconf import DictConfig

from experiments.scores.benchmarks import make_benchmark
from tbac.app import command


def check_steps(cfg: DictConfig) -> None:
    """Raise ValueError for steps and processes that don't go together."""
    if cfg.rank >= cfg.world_size:
        raise ValueError(f"rank={cfg.rank} of world_size={cfg.world_size}: processes are counted from 0")
    if cfg.world_size > 1 and list(cfg.steps) != ["generate"]:
        raise ValueError("several processes take steps=[generate]; score and report are for one, when all are done")


@command("evaluate")
def main(cfg: DictConfig) -> None:
    check_steps(cfg)
    benchmark = make_benchmark(cfg)
    from experiments.scores.steps import run_benchmark  # torch and diffusers, only when the benchmark is right

    run_benchmark(cfg, benchmark)


if __name__ == "__main__":
    main()

"""Speed and memory of training steps, sampling and loading, against other ways of doing the same, interleaved.

python experiments/bench.py                       (make bench)      on the CPU, with the real model's proportions
python experiments/bench.py experiment=bench_gpu  (make bench-gpu)  on a GPU, real sizes, random weights
python experiments/bench.py experiment=real_size_cpu                 one step of real sizes within 24 GB on a CPU
"""

import json
from pathlib import Path

import hydra
from omegaconf import DictConfig

from tbac.app import CONF, keep_freed_memory, plain, user_errors


@hydra.main(version_base="1.3", config_path=CONF, config_name="bench")
@user_errors
def main(cfg: DictConfig) -> None:
    from experiments.speed.parts import bench, check  # torch and diffusers, only when the config is right

    keep_freed_memory()
    options = plain(cfg)
    check(options)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    report = bench(options)
    tables = [f"## {part.capitalize()}\n\n{report[part].pop('table')}" for part in options["parts"]]
    facts = (
        f"{report['device']}, {report['precision']}; medians of {options['repeats']} "
        + (
            f"steps in each of {options['turns']} turns"
            if options["isolate"]
            else "rounds, each side once in every round"
        )
        + "; latents cached on all sides unless a table says otherwise."
    )
    text = "\n\n".join(["# The release's way against ours", facts, *tables]) + "\n"
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

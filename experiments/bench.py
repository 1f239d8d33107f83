"""Speed and memory of training steps, sampling and loading, against other ways of doing the same, interleaved.

python experiments/bench.py                       (make bench)      on the CPU, with the real model's proportions
python experiments/bench.py experiment=bench_gpu  (make bench-gpu)  on a GPU, real sizes, random weights
python experiments/bench.py experiment=real_size_cpu                 one step of real sizes within 24 GB on a CPU
"""

import json
from pathlib import Path

from omegaconf import DictConfig

from tbac.app import command, keep_freed_memory, to_plain


@command("bench")
def main(cfg: DictConfig) -> None:
    from experiments.speed.parts import bench, check  # torch and diffusers, only when the config is right
    from experiments.speed.running import format_result
    from experiments.speed.training import utilisation

    keep_freed_memory()
    options = to_plain(cfg)
    check(options)
    out = Path(cfg.out)
    report = bench(options, out)
    texts = {part: format_result(report[part]) for part in options["parts"]}
    for part in options["parts"]:
        report[part].pop("table", None)
    # Utilisation needs three parts, which may have run at different times.
    if all("line" in report.get(part, {}) for part in ("flops", "rates", "training")):
        texts["training"] += "\n\n" + utilisation(report["flops"], report["rates"], report["training"])
    tables = [f"## {part.replace('_', ' ').capitalize()}\n\n{text}" for part, text in texts.items()]
    # The first paragraph says how the numbers were taken.
    if options["isolate"]:
        rounds = f"steps in each of {options['turns']} turns"
    else:
        rounds = "rounds, each side once in every round"
    facts = (
        f"{report['device']}, {report['precision']}; medians of {options['repeats']} {rounds}; "
        "latents cached on all sides unless a table says otherwise."
    )
    text = "\n\n".join(["# The release's way against ours", facts, *tables]) + "\n"
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "report.md").write_text(text)
    print(text)
    # The results of the other parts are kept; the exit status says that some are missing.
    failed = [part for part in options["parts"] if "error" in report[part]]
    if failed:
        raise ValueError(f"{', '.join(failed)} failed; the others' results are in {out}, and the same command goes on")


if __name__ == "__main__":
    main()

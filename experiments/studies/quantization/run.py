"""What fewer bits for the MLLM cost: memory, taps, score, answers.

python experiments/studies/quantization/run.py checkpoint=outputs/demo/model
"""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.reports import format_table
from tbac.app import command


@command("study/quantization")
def main(cfg: DictConfig) -> None:
    # Torch and diffusers are imported only when the config is right.
    from experiments.studies.quantization.measure import measure_options

    rows = measure_options(cfg)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    digits = {"MiB": 2, "cosine of taps": 4}

    def write_cell(column: str, value: Any) -> Any:
        return f"{value:.{digits.get(column, 3)}f}" if isinstance(value, float) else value

    table = format_table(list(rows[0]), [list(map(write_cell, row.keys(), row.values())) for row in rows])
    (out / "report.json").write_text(json.dumps(rows, indent=2) + "\n")
    (out / "report.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()

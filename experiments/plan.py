"""What a model needs, without building it.

python experiments/plan.py model=qwen2_5_vl_3b_sana_1600m model.random_init=true
"""

import json
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from experiments.common import CONF, output_dir, user_errors
from tbac.models import UniImage


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_parts(model: UniImage) -> dict[str, int]:
    """Parameters of every part; tied tables are counted once."""
    mllm = model.mllm.body
    layers = mllm.language_model
    embeddings = count(layers.embed_tokens)
    return {
        "mllm_layers": count(layers) - embeddings,
        "mllm_embeddings": embeddings,
        "mllm_vision": count(mllm.visual),
        "queries": model.ladder.queries.numel(),
        "connector": count(model.ladder) - model.ladder.queries.numel(),
        "denoiser": count(model.denoiser),
        "autoencoder": count(model.autoencoder),
    }


def plan(cfg: DictConfig) -> dict[str, Any]:
    """Counts of the parts, and how much of it trains."""
    with torch.device("meta"):
        model: UniImage = instantiate(cfg.model, random_init=True)
    parts = count_parts(model)
    trained = parts["queries"] + parts["connector"] + parts["denoiser"]
    total = count(model)
    plan = model.ladder.plan
    return {
        "parameters": parts,
        "total": total,
        "trained": trained,
        "frozen": total - trained,
        "taps": plan.layer_of_block() if not plan.mixed else list(plan.layers),
    }


@hydra.main(version_base="1.3", config_path=CONF, config_name="plan")
@user_errors
def main(cfg: DictConfig) -> None:
    report = plan(cfg)
    for name, value in (*report["parameters"].items(), *((k, report[k]) for k in ("total", "trained", "frozen"))):
        print(f"{name:16s} {value:>15,d}  {value / 1e6:>9.1f} M")
    print(f"taps             {report['taps']}")
    (output_dir() / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

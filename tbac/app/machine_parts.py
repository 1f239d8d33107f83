"""The options of a machine: its processes, its scheduler of jobs, and the trainer that runs on it."""

from tbac.app.groups import Fields, Part, counts
from tbac.app.kinds import anything, choice, either, flag, list_of, number, optional, path, plain_mapping, text, whole

DEVICES = either(choice("auto", -1), whole(), list_of(whole(0), least=1, single=False))
PRECISION = choice(
    "32-true", "32", "16-mixed", "16-true", "16", "bf16-mixed", "bf16-true", "bf16", "64-true", "64", 32, 16, 64
)
ACCELERATOR = choice("auto", "cpu", "cuda", "gpu", "mps")
STRATEGY = choice("auto", "ddp", "fsdp")
SLURM: Fields = {
    **dict.fromkeys(("account", "partition", "qos", "constraint", "gres", "container"), optional(text())),
    **counts("cpus_per_task", "points_at_once"),
    "gpu_memory_gb": optional(number(above=0)),
    **dict.fromkeys(("chain", "copy_code"), flag()),
    "mem_gb": optional(number(above=0)),
    **counts("minutes", "signal_seconds"),
    "setup": list_of(text()),
    "options": plain_mapping(),
}
MACHINE: Fields = {
    "accelerator": ACCELERATOR,
    "devices": DEVICES,
    "num_nodes": whole(),
    "strategy": STRATEGY,
    "precision": PRECISION,
    "num_workers": whole(0),
    "timeout_minutes": number(above=0),
    "slurm": SLURM,
}
SOME_BATCHES = optional(either(whole(0), number(least=0, most=1)))
TRAINER = Part(
    {
        "lightning.Trainer": {
            "accelerator": ACCELERATOR,
            "devices": DEVICES,
            "num_nodes": whole(),
            "strategy": Part(
                {"tbac.training.strategies.make_strategy": {"name": STRATEGY, "timeout_minutes": number(above=0)}}
            ),
            "precision": PRECISION,
            "max_steps": whole(-1),
            "max_epochs": optional(whole(-1)),
            "min_steps": optional(whole()),
            "min_epochs": optional(whole()),
            "max_time": anything(),
            "gradient_clip_val": optional(number(above=0)),
            "gradient_clip_algorithm": optional(choice("norm", "value")),
            "accumulate_grad_batches": whole(),
            **dict.fromkeys(
                ("inference_mode", "use_distributed_sampler", "detect_anomaly", "barebones", "sync_batchnorm",
                 "fast_dev_run", "enable_autolog_hparams"), flag(),
            ),
            **dict.fromkeys(("enable_model_summary", "enable_progress_bar", "enable_checkpointing"), optional(flag())),
            "num_sanity_val_steps": optional(whole(-1)),
            "log_every_n_steps": optional(whole(0)),
            "deterministic": optional(either(flag(), choice("warn"))),
            "benchmark": optional(flag()),
            "default_root_dir": optional(path()),
            "plugins": anything(),
            "profiler": anything(),
            "overfit_batches": SOME_BATCHES,
            "limit_train_batches": SOME_BATCHES,
            "limit_val_batches": SOME_BATCHES,
            "val_check_interval": anything(),
            "check_val_every_n_epoch": optional(whole()),
            "reload_dataloaders_every_n_epochs": whole(0),
        }
    }
)  # fmt: skip

"""The options of what training is made of: a stage, its data, and each class of ours that a YAML of training names.

The options of a model aren't here: the dataclasses of `tbac/models/config.py` check themselves, without torch.
"""

from tbac.app.groups import PROBABILITY, SIZE, Fields, Part, Parts, counts, shares
from tbac.app.kinds import (
    Kind,
    anything,
    choice,
    either,
    flag,
    list_of,
    name,
    number,
    optional,
    path,
    pattern,
    plain_mapping,
    record,
    seed,
    some_of,
    text,
    whole,
)

TRAINABLE = ("queries", "connector", "denoiser")
SOURCE = record(
    {"path": path()},
    {"split": name(), "weight": number(above=0), "task": choice("generate", "reconstruct")},
    "{path: …, split: …, weight: …, task: …}",
)
SOURCE_OR_FOLDER = Kind(
    "a folder of shards, or {path: …, split: …, weight: …, task: …}",
    lambda value: SOURCE.read({"path": value, "split": "train"} if isinstance(value, str) else value),
)
DROPOUT = Part(
    {"tbac.data.transforms.ConditionDropout": shares("caption_drop_prob", "image_drop_prob", "both_drop_prob")}
)
REINFORCE = Part(
    {
        "tbac.training.reinforce_options.ReinforceOptions": {
            "prompts": either(choice("rewards", "shards"), path()),
            "drawing": {
                "group_size": whole(2), "num_inference_steps": whole(), "scheduler": optional(plain_mapping()),
            },
            "loss": {"beta": number(above=0), "weigh_errors": flag(), "kl_weight": number(least=0)},
            "rounds": {"steps": whole(), "decay": number(least=0, below=1), "decay_growth": number(least=0)},
            "patience": dict.fromkeys(("first_seconds", "longest_seconds", "give_up_minutes"), number(above=0)),
            "supervised_weight": number(least=0),
        }
    },
    needed=False,
)  # fmt: skip
STAGE: Fields = {
    "name": name(),
    "previous": optional(name()),
    "steps": optional(whole()),
    "samples": optional(whole()),
    "patience": optional(whole()),
    "min_delta": number(least=0),
    "trainable": some_of(*TRAINABLE),
    "keep_optimizer": flag(),
    "batch_size": whole(),
    "accumulate": whole(),
    "noise_samples_per_prompt": whole(),
    "image_size": whole(),
    "lr": number(above=0),
    "min_lr": number(least=0),
    "warmup_steps": whole(0),
    "weight_decay": number(least=0),
    "clip": optional(number(above=0)),
    "val_every": whole(),
    "val_samples": whole(),
    "ema_decay": number(least=0, below=1),
    "dropout": DROPOUT,
    "sources": list_of(SOURCE_OR_FOLDER, least=1),
    "val_sources": list_of(SOURCE_OR_FOLDER),
    "shuffle_buffer": whole(),
    "sample_prompts": list_of(text()),
    "sample_guidance": number(least=0),
    "sample_steps": whole(),
    "reinforce": REINFORCE,
}
DATA = Part(
    {
        "tbac.data.datamodule.ShardDataModule": {
            "sources": list_of(SOURCE_OR_FOLDER, least=1),
            "val_sources": list_of(SOURCE_OR_FOLDER),
            "dropout": DROPOUT,
            **counts("batch_size", "val_batch_size", "val_samples", "image_size", "shuffle_buffer", "prefetch_factor"),
            "seed": seed(),
            "num_workers": whole(0),
            "max_bad_share": PROBABILITY,
            "use_latents": flag(),
            "check_manifest": flag(),
            "buckets": optional(either(choice("sana"), list_of(SIZE, least=1, single=False))),
            "reducing_gap": optional(number(least=1)),
            "cache_dir": optional(path()),
        }
    }
)
PROMPT_CACHE = Part(
    {
        "tbac.models.prompt_cache.PromptCacheConfig": {
            "keep": optional(choice("prompts", "images")),
            "folder": optional(path()),
            "max_gib": number(above=0),
        }
    }
)
BETAS = list_of(number(least=0, below=1), count=2, single=False)
ADAM: Fields = {"lr": number(above=0), "betas": BETAS, "eps": number(above=0)}
OPTIM = Part(
    {"tbac.training.optimizers.adamw": {**ADAM, "fused": flag()}, "tbac.training.optimizers.adamw8bit": ADAM},
)
SCHEDULE = Part(
    {"tbac.training.optimizers.warmup_cosine": {"warmup_steps": whole(0), "min_lr": number(least=0)}},
)
FLOW = Part(
    {
        "tbac.training.stages.FlowOptions": {
            "scheme": choice("uniform", "logit_normal"),
            "shift": number(above=0),
            "noise_samples_per_prompt": whole(),
        }
    }
)
GUARD = Part(
    {
        "tbac.training.spikes.RobustRule": {
            **counts("window", "warmup", "common"),
            "deviations": number(above=0),
            **dict.fromkeys(("min_ratio", "max_ratio", "common_ratio"), number(least=1)),
        },
        "tbac.training.spikes.RunningMeanRule": {
            "decay": number(least=0, below=1),
            **dict.fromkeys(("loss_ratio", "norm_ratio", "min_norm", "max_norm", "max_loss"), number(above=0)),
        },
    }
)
SIGNAL = pattern("SIG[A-Z0-9]+", "the name of a signal, such as SIGTERM")
CALLBACK = "tbac.training.callbacks"
CALLBACKS = Parts(
    Part(
        {
            f"{CALLBACK}.checkpoint.Checkpoint": {
                "folder": path(),
                **counts("every", "keep"),
                "keep_every": optional(whole()),
                "monitor": optional(text()),
            },
            f"{CALLBACK}.ema.EMA": {"decay": number(least=0, below=1)},
            f"{CALLBACK}.guard.Guard": {
                "rule": anything(),
                **counts("patience", "max_rejects", "over", "log_every"),
                "then": choice("skip", "lower_lr", "rewind"),
                "lr_factor": number(above=0, below=1),
            },
            f"{CALLBACK}.preemption.Preemption": {"stop": list_of(SIGNAL), "requeue": list_of(SIGNAL)},
            f"{CALLBACK}.sample_grid.SampleGrid": {
                "prompts": list_of(text()),
                "guidance_scale": number(least=0),
                "num_inference_steps": whole(),
                "folder": path(),
                "seed": seed(),
                "scale": optional(whole()),
            },
            f"{CALLBACK}.sample_log.SampleLog": {"folder": path()},
            f"{CALLBACK}.throughput.Throughput": {"every": whole()},
            f"{CALLBACK}.watchdog.Watchdog": {
                **dict.fromkeys(("stuck_minutes", "gone_seconds", "beat_seconds"), number(above=0)),
            },
            f"{CALLBACK}.learning_rate.LearningRate": {},
            f"{CALLBACK}.progress.ProgressLine": dict.fromkeys(("seconds", "refresh"), number(above=0)),
            "lightning.pytorch.callbacks.LearningRateMonitor": {
                "logging_interval": optional(choice("step", "epoch")),
                "log_momentum": flag(),
                "log_weight_decay": flag(),
            },
            "lightning.pytorch.callbacks.TQDMProgressBar": {
                "refresh_rate": whole(0), "process_position": whole(0), "leave": flag(),
            },
        }
    )
)  # fmt: skip
LOGGER = Part(
    {
        "lightning.pytorch.loggers.CSVLogger": {
            "save_dir": path(), "name": optional(text(empty=True)), "version": anything(), "prefix": text(empty=True),
            "flush_logs_every_n_steps": whole(),
        },
        "tbac.training.csv_log.LastingCSVLogger": {"save_dir": path(), "name": text(empty=True)},
        "tbac.training.tracking.make_mlflow_logger": {
            "experiment_name": text(),
            "run_name": optional(text()),
            "tracking_uri": text(),
            "parent_run_id": optional(text()),
            "run_id_file": optional(path()),
        },
    },
    needed=False,
)  # fmt: skip

"""The options of the groups of conf/: of a stage, of a machine, and of each class of ours that a YAML names.

The options of a model aren't here: the dataclasses of `tbac/models/config.py` check themselves, without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tbac.app.kinds import (
    Kind,
    anything,
    choice,
    either,
    flag,
    list_of,
    mapping_of,
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
)  # fmt: skip
from tbac.models.config import DTYPE_NAMES, QUANTIZATIONS

TRAINABLE = ("queries", "connector", "denoiser")
DEVICE = pattern(r"auto|cpu|mps|cuda(:\d+)?", "auto, cpu, cuda, cuda:NUMBER or mps")
SIZE = list_of(whole(), count=2, single=False)
PROBABILITY = number(least=0, most=1)


@dataclass(frozen=True)
class Part:
    """A group that names a class by `_target_`.

    Attributes:
        options: dotted name of a class of ours -> its options.
        common: options that a class from elsewhere must understand as ours do, where it has them.
        needed: whether null is refused.
    """

    options: Mapping[str, "Fields"]
    common: "Fields" = field(default_factory=dict)
    needed: bool = True


@dataclass(frozen=True)
class Parts:
    """A group of several named parts, such as the callbacks; names are the user's choice."""

    part: Part


Fields = Mapping[str, "Kind | Part | Parts | Fields"]


def shares(*names: str) -> Fields:
    """Options that are probabilities."""
    return dict.fromkeys(names, PROBABILITY)


def counts(*names: str) -> Fields:
    """Options that are whole numbers of at least 1."""
    return dict.fromkeys(names, whole())


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

# Benchmarks and judges, and what a benchmark of the user's own has too.
DRAWING: Fields = {
    "name": name(),
    "title": text(empty=True),
    **counts("num_inference_steps", "batch_size"),
    "guidance_scale": number(least=0),
    "image_guidance_scale": optional(number(least=0)),
    "seed": seed(),
    "limit": optional(whole()),
    "tries": whole(),
    "steady": flag(),
    "published_protocol": optional(plain_mapping()),
}
BENCHMARKS = "tbac.evaluation.benchmarks"
QUESTIONS = SCRIPT = optional(path())
MODEL_NAME = pattern(r"\w[\w.-]{0,99}(/\w[\w.-]{0,99})?", "a name of a folder, or owner/name as on a model hub")
BENCHMARK = Part(
    {
        f"{BENCHMARKS}.answers.Answers": {"name": name(), "file": path(), "batch_size": whole()},
        f"{BENCHMARKS}.geneval.GenEval": {**DRAWING, "file": path(), "samples": whole()},
        f"{BENCHMARKS}.edits.Edits": {**DRAWING, "file": path()},
        f"{BENCHMARKS}.folder.Folder": {**DRAWING, "file": path(), "samples": whole()},
        f"{BENCHMARKS}.dpg.DPG": {
            **DRAWING, "file": path(), "questions": QUESTIONS, "mode": text(),
        },
        f"{BENCHMARKS}.tiif.TIIF": {
            **DRAWING, "file": path(), "questions": QUESTIONS, "script": SCRIPT, "read_words": flag(),
            "model_name": MODEL_NAME,
        },
        f"{BENCHMARKS}.imgedit.ImgEdit": {**DRAWING, "file": path(), "images": path(), "questions": QUESTIONS},
        f"{BENCHMARKS}.wise.WISE": {**DRAWING, "file": path(), "script": SCRIPT},
        f"{BENCHMARKS}.wise.WISEVerified": {**DRAWING, "file": path(), "script": SCRIPT},
        f"{BENCHMARKS}.geneval2.GenEval2": {**DRAWING, "file": path()},
        f"{BENCHMARKS}.unigenbench.UniGenBench": {
            **DRAWING, "file": path(), "category": choice("en", "en_long", "zh", "zh_long"), "script": SCRIPT,
            "samples": whole(), "model_name": MODEL_NAME,
        },
        f"{BENCHMARKS}.corebench.CoReBench": {
            **DRAWING, "file": path(), "script": SCRIPT, "samples": whole(), "model_name": MODEL_NAME,
        },
        f"{BENCHMARKS}.longtext.LongText": {
            **DRAWING, "file": path(), "mode": choice("en", "zh"), "script": SCRIPT, "samples": whole(),
        },
        f"{BENCHMARKS}.gedit.GEdit": {
            **DRAWING, "file": path(), "images": path(), "language": choice("en", "cn", "all"), "script": SCRIPT,
            "model_name": MODEL_NAME,
        },
    },
    common={key: kind for key, kind in DRAWING.items() if key not in ("num_inference_steps", "batch_size")},
)  # fmt: skip
JUDGES = "tbac.evaluation.judges"
DETECTORS = "tbac.evaluation.detectors"
JUDGE = Part(
    {
        f"{JUDGES}.endpoint.EndpointJudge": {
            "model": text(), "max_retries": whole(0), "timeout": number(above=0), "max_tokens": whole(),
        },
        f"{JUDGES}.qwen.QwenJudge": {
            "mllm": path(),
            "device": DEVICE,
            "dtype": choice(*DTYPE_NAMES),
            "quantization": optional(choice(*QUANTIZATIONS)),
            **counts("image_pixels", "max_text_tokens", "max_new_tokens"),
        },
        f"{JUDGES}.ocr.OcrJudge": {"min_score": PROBABILITY, "least_side": whole()},
        f"{DETECTORS}.mask2former.Mask2FormerDetector": {"segmenter": path(), "clip": path(), "device": DEVICE},
        f"{DETECTORS}.template.TemplateDetector.from_world": {"path": path()},
    }
)  # fmt: skip

# Layouts of datasets, and the world that is drawn.
CAPTIONS = Part(
    {
        "data_prep.shapes.captions.draw_captions": {"seed": seed(), "count": whole()},
        "data_prep.words.captions.draw_captions": {"seed": seed(), "count": whole()},
        "tbac.evaluation.captions.read_table": {"path": path()},
    }
)
DATASETS = "data_prep.datasets"
DATASET = Part(
    {
        f"{DATASETS}.webdataset_tars.WebDatasetTars": {"path": path(), "name": text()},
        f"{DATASETS}.image_folder.ImageFolder": {"path": path(), "name": text()},
        f"{DATASETS}.gpt_image_edit.GPTImageEdit": {"path": path(), "metadata": optional(list_of(path()))},
        f"{DATASETS}.sharegpt4o.ShareGPT4oImage": {"path": path(), "half": choice("edit", "t2i")},
        f"{DATASETS}.table.Table": {
            "path": path(), "name": text(), "text": text(), "image": text(), "sources": list_of(text()),
            "key": optional(text()), "images": optional(path()),
        },
    },
    common={"path": path()},
)  # fmt: skip
CONVERSION = Part(
    {
        "data_prep.shards.conversion.ConversionOptions": {
            "samples_per_shard": whole(), "val_samples": whole(0), "val_share": number(above=0, most=0.5),
            "check_images": flag(),
        }
    }
)  # fmt: skip
SIZES = Part(
    {
        "data_prep.shapes.samples.Sizes": counts(
            "t2i", "edit", "curated", "val", "samples_per_shard", "prompts_per_tag", "questions", "edits", "dense",
            "pairs_per_type",
        )
    }
)  # fmt: skip
SCENES = Part({"data_prep.shapes.scene.Mixture": shares("words", "dense")})
PRETRAINING: Fields = {**counts("steps", "batch_size"), "lr": number(above=0)}
RECIPE = Part(
    {
        "data_prep.shapes.pretrain_mllm.Recipe": {
            **PRETRAINING,
            **counts("vision_steps", "pictures"),
            "vision_lr": number(above=0),
            "embedding_std": number(above=0),
            **shares("told", "told_imagined"),
        }
    }
)
WORD_SIZES = Part(
    {
        "data_prep.words.samples.Sizes": counts(
            "t2i", "edit", "curated", "val", "samples_per_shard", "prompts_per_tag", "dense", "edits", "questions"
        )
    }
)  # fmt: skip
VISION_RECIPE = Part(
    {
        "data_prep.words.vision.Recipe": {
            **counts("word_steps", "steps", "batch_size", "pictures"),
            "word_lr": number(above=0),
            "lr": number(above=0),
        }
    }
)
NAMES_TO_LISTS = mapping_of(list_of(text()), "a mapping from names to lists of texts")

"""The options of each command, and the check of a whole config before anything heavy is loaded.

A command has the name of its file in conf/. A key that isn't here is no option, except in what a class checks itself:
one from elsewhere, and the dataclasses of a model.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from tbac.app.dataset_parts import CONVERSION, DATASET, PRETRAINING, RECIPE, SCENES, SIZES, VISION_RECIPE, WORD_SIZES
from tbac.app.groups import DEVICE, NAMES_TO_LISTS, PROBABILITY, Fields, Part, Parts, counts
from tbac.app.kinds import (
    Kind,
    anything,
    choice,
    flag,
    list_of,
    mapping_of,
    name,
    new_folder,
    number,
    optional,
    path,
    plain_mapping,
    seed,
    some_of,
    text,
    unique,
    whole,
)  # fmt: skip
from tbac.app.machine_parts import MACHINE, PRECISION, TRAINER
from tbac.app.parts import CALLBACKS, DATA, FLOW, GUARD, LOGGER, OPTIM, PROMPT_CACHE, SCHEDULE, STAGE
from tbac.app.scoring_parts import BENCHMARK, CAPTIONS, JUDGE, REWARD
from tbac.models.checks import DTYPE_NAMES, QUANTIZATIONS

CHOSEN_LATER = ("dataset",)  # the command itself names those that there are
OVERRIDES = list_of(text())
CHECKED_BY_THE_MODEL = plain_mapping()
MODEL: Fields = {"model": CHECKED_BY_THE_MODEL, "taps": CHECKED_BY_THE_MODEL, "ladder": CHECKED_BY_THE_MODEL}
OPENING: Fields = {
    "checkpoint": path(),
    "mllm": optional(path()),
    "denoiser": optional(path()),
    "prompt_embeddings": optional(path()),
    "connector": optional(plain_mapping()),
}
PIPELINE: Fields = {
    **OPENING,
    "device": DEVICE,
    "dtype": choice(*DTYPE_NAMES),
    "quantization": optional(choice(*QUANTIZATIONS)),
}
PROCESSES: Fields = {"rank": whole(0), "world_size": whole()}
STAGES = unique(list_of(name(), least=1))
COMMANDS: dict[str, Fields] = {
    "train": {
        "seed": seed(),
        "stages": optional(STAGES),
        "stage_overrides": NAMES_TO_LISTS,
        "init": optional(path()),
        "resume": optional(path()),
        "run_dir": path(),
        "submit": flag(),
        "parent_run_id": optional(text()),
        "stage": STAGE,
        "reward": REWARD,
        "machine": MACHINE,
        **MODEL,
        "flow": FLOW,
        "data": DATA,
        "prompt_cache": PROMPT_CACHE,
        "optim": OPTIM,
        "schedule": SCHEDULE,
        "guard": GUARD,
        "callbacks": CALLBACKS,
        "logger": LOGGER,
        "trainer": TRAINER,
    },
    "generate": {
        **PIPELINE,
        "from": optional(path()),
        "prompts": list_of(text()),
        "prompt_file": optional(path()),
        "images": list_of(path()),
        "negative_prompt": text(empty=True),
        **counts("num_inference_steps", "num_images_per_prompt", "batch_size"),
        "guidance_scale": number(least=0),
        "image_guidance_scale": number(least=0),
        "guidance_interval": list_of(PROBABILITY, count=2, single=False),
        "batch_branches": flag(),
        "compile": flag(),
        "height": optional(whole()),
        "width": optional(whole()),
        "seed": seed(),
        "out": new_folder(),
    },
    "app": {
        **PIPELINE,
        "against": optional(path()),
        "port": whole(1, 65535),
        "share": flag(),
        **counts("num_inference_steps"),
        "guidance_scale": number(least=1, most=10),
        "image_guidance_scale": number(least=1, most=5),
        "examples": list_of(text()),
        "out": new_folder(),
    },
    "answer": {
        **PIPELINE,
        **counts("max_new_tokens"),
        **dict.fromkeys(("do_sample", "stream"), flag()),
        "question": text(),
        "image": optional(path()),
        "temperature": optional(number(above=0)),
        "top_k": optional(whole()),
        "top_p": optional(number(above=0, most=1)),
        "repetition_penalty": optional(number(above=0)),
        "seed": optional(seed()),
    },
    "evaluate": {
        **PIPELINE,
        "samples": whole(),
        "benchmark": BENCHMARK,
        "judge": JUDGE,
        "against": optional(path()),
        "steps": some_of("generate", "score", "report"),
        "tracking_uri": text(),
        "out": new_folder(),
        "overwrite": flag(),
        **PROCESSES,
    },
    "export": {
        **OPENING,
        "out": new_folder(),
        "standalone": flag(),
        "adapter": flag(),
        "push_to_hub": optional(text()),
        "private": flag(),
    },
    "import_official": {
        **dict.fromkeys(("checkpoint", "mllm", "denoiser"), path()),
        "out": new_folder(),
        "image_pixels": whole(),
        "standalone": flag(),
    },
    "plan": {
        **MODEL,
        "stage": STAGE,
        "prompt_cache": PROMPT_CACHE,
        "optim": OPTIM,
        "machine": MACHINE,
        "stages": STAGES,
        **counts("text_tokens", "image_tokens"),
        "edit_share": mapping_of(PROBABILITY, "a mapping from stages to shares"),
        "cached_latents": flag(),
        "peak_tflops": number(above=0),
        "utilisation": number(above=0, most=1),
        "overhead_gib": number(least=0),
        "memory_gb": list_of(number(above=0), least=1),
    },
    "probe": {
        **MODEL,
        "captions": CAPTIONS,
        **dict.fromkeys(("checkpoint", "mllm", "denoiser"), optional(path())),
        "device": DEVICE,
        **counts("batch_size", "most_layers"),
        "rules": list_of(text()),
    },
    "demo": {
        **dict.fromkeys(("geneval", "edits", "answers"), BENCHMARK),
        "judge": JUDGE,
        "title": text(),
        "out": new_folder(),
        "world_folder": new_folder(),
        "seed": seed(),
        "stages": STAGES,
        "world_overrides": OVERRIDES,
        "train_overrides": OVERRIDES,
        "stage_overrides": NAMES_TO_LISTS,
        "suites": NAMES_TO_LISTS,
        "tracking_uri": text(),
    },
    "sweep": {
        **dict.fromkeys(("geneval", "edits"), BENCHMARK),
        "judge": JUDGE,
        "name": name(),
        "overrides": OVERRIDES,
        "out": new_folder(),
        "tracking_uri": text(),
        "suites": unique(list_of(name())),
        "suite_overrides": OVERRIDES,
        "prompts_per_tag": whole(),
    },
    "convert": {"out": new_folder(), "processes": whole(), "options": CONVERSION, "dataset": DATASET},
    "verify": {
        "path": path(),
        "tokenizer": optional(path()),
        "processes": whole(),
        "samples": flag(),
        "write_sizes": flag(),
    },
    "cache_latents": {
        **dict.fromkeys(("path", "denoiser"), path()),
        "out": new_folder(),
        **counts("image_size", "batch_size"),
        "buckets": anything(),  # read with the side of the square, by `parse_buckets`
        "reducing_gap": optional(number(least=1)),
        **dict.fromkeys(("dtype", "encode_dtype"), choice(*DTYPE_NAMES)),
        "keep_images": flag(),
        "device": DEVICE,
        **PROCESSES,
    },
    "shapes": {
        **MODEL,
        "out": new_folder(),
        "seed": seed(),
        "processes": whole(),
        "sizes": SIZES,
        "scenes": SCENES,
        "autoencoder": PRETRAINING,
        "denoiser": PRETRAINING,
        "mllm": RECIPE,
    },
    "words": {
        **MODEL,
        "out": new_folder(),
        "seed": seed(),
        "install": flag(),
        "processes": whole(),
        "sizes": WORD_SIZES,
        "autoencoder": PRETRAINING,
        "denoiser": PRETRAINING,
        "vision": VISION_RECIPE,
    },
    "bench": {
        **MODEL,
        "optim": OPTIM,
        "stage": {"lr": number(above=0)},
        "device": DEVICE,
        "limits_s": mapping_of(number(above=0), "a mapping from parts to seconds"),
        "precision": PRECISION,
        **dict.fromkeys(("parts", "sides"), unique(list_of(text(), least=1))),
        **dict.fromkeys(("isolate", "compare", "measure_memory"), flag()),
        "tokens": mapping_of(list_of(whole()), "a mapping from kinds of prompts to lengths"),
        "batch": mapping_of(whole(), "a mapping from kinds of prompts to batch sizes"),
        **counts("turns", "latent_side", "repeats", "copy_mib", "matmul_size"),
        **dict.fromkeys(("shared_tokens", "warm_up"), whole(0)),
        **dict.fromkeys(
            ("compile_options", "overhead", "sampling", "cached", "prompt_cache", "loader"), plain_mapping()
        ),
        "memory_caps_gib": list_of(number(above=0)),
        "out": new_folder(),
    },
    "study/faults": {"rows": list_of(name()), "kills": whole(0), "seed": seed(), "out": new_folder()},
    "study/guard": {"steps": whole(), "overrides": OVERRIDES, "out": new_folder()},
    "study/quantization": {
        **OPENING,
        **dict.fromkeys(("geneval", "answers"), BENCHMARK),
        "judge": JUDGE,
        "device": DEVICE,
        "out": new_folder(),
    },
}
COMMANDS["cache_prompts"] = {**COMMANDS["train"], **PROCESSES}


def check_config(command: str, cfg: DictConfig) -> None:
    """Check every option of a command, and put in place what is meant where it was said in another way.

    Args:
        command: name of its file in conf/.
        cfg: as Hydra composed it.

    Raises:
        ValueError: naming the option, its value and what is accepted; for a key that isn't an option, too.
    """
    fields = COMMANDS[command]
    missing = []
    for option, accepted in fields.items():
        if option in cfg or option in CHOSEN_LATER:
            continue
        optional_group = isinstance(accepted, Parts) or (isinstance(accepted, Part) and not accepted.needed)
        if not optional_group:
            how = f"{option}=NAME, one of conf/{option}/"
            if isinstance(accepted, Kind):
                how = f"{option}=…, {accepted.accepted}"
            missing.append(f"{option} is needed: {how}")
            continue
        with open_dict(cfg):
            cfg[option] = None
    if missing:
        raise ValueError("; ".join(missing))
    _check_fields(cfg, fields, "")


def find_kind(command: str, option: str) -> Kind | None:
    """Find what an option accepts; None for one that isn't known by its name alone.

    Args:
        command: name of its file in conf/.
        option: dotted name, as on a command line.
    """
    fields: Any = COMMANDS[command]
    for key in option.split("."):
        if isinstance(fields, Part):
            options = [of_class[key] for of_class in fields.options.values() if key in of_class]
            fields = options[0] if options else None
        elif isinstance(fields, Mapping):
            fields = fields.get(key)
        else:
            return None
    known = isinstance(fields, Kind) and fields is not CHECKED_BY_THE_MODEL
    return fields if known else None


def _check_fields(config: DictConfig, fields: Fields, prefix: str, foreign: bool = False) -> None:
    """Check the options below a node.

    Args:
        config: the node.
        fields: its options.
        prefix: its dotted name and a dot, or nothing for the root.
        foreign: whether it may have other keys too.
    """
    for key in map(str, config):
        if key not in fields and not foreign:
            near = difflib.get_close_matches(key, list(fields), 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
            raise ValueError(f"{prefix}{key} isn't an option; {hint}")
    for key, accepted in fields.items():
        option = f"{prefix}{key}"
        if OmegaConf.is_missing(config, key):
            words = accepted.accepted if isinstance(accepted, Kind) else "a mapping"
            raise ValueError(f"{option} is needed: give {option}=…, {words}")
        if key in config:
            _check_option(config, key, accepted, option)


def _check_option(config: DictConfig, key: str, accepted: Any, option: str) -> None:
    """Check one option, and write what is meant in its place."""
    value = config[key]
    if isinstance(accepted, Kind):
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        meant = accepted.check(option, plain)
        if type(meant) is not type(plain) or meant != plain:
            with read_write(config), open_dict(config):
                config[key] = meant
        return
    if value is None and isinstance(accepted, Part) and not accepted.needed:
        return
    if value is None and isinstance(accepted, Parts):  # no callback at all
        return
    if not isinstance(value, DictConfig):
        way = f", or leave it out with ~{option}" if value is None else ""
        raise ValueError(f"{option} must be a mapping of its options; got {value!r}{way}")
    if isinstance(accepted, Parts):
        for named in map(str, value):
            _check_option(value, named, accepted.part, f"{option}.{named}")
    elif isinstance(accepted, Part):
        _check_part(value, accepted, option)
    else:
        _check_fields(value, accepted, f"{option}.")


def _check_part(config: DictConfig, part: Part, option: str) -> None:
    """Check the options of a class that is named by `_target_`."""
    target = config.get("_target_")
    if not isinstance(target, str) or not target:
        raise ValueError(f"{option}._target_ must name a class, as module.Class; got {target!r}")
    own = part.options.get(target)
    words = {"_target_": text(), "_partial_": flag(), "_convert_": text(), "_recursive_": flag(), "_args_": anything()}
    _check_fields(config, {**(part.common if own is None else own), **words}, f"{option}.", foreign=own is None)

"""Reading the released checkpoint as a UniImage; it accounts for every tensor.

The release saves everything together: the whole MLLM with the queries as last rows of its embedding table, the
connector, SANA's transformer and the autoencoder. The trained tensors are taken. The frozen ones must equal those of
the base models and are then left out. The embedding table, which weight decay has changed, is kept for reading prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import SanaTransformer2DModel

from tbac.files import expand_path, read_json, shorten
from tbac.models.architecture import check_config
from tbac.models.config import ModelConfig
from tbac.models.ladder import Ladder
from tbac.models.saved import SavedModel
from tbac.models.sources import DENOISER_FILES, MLLM_FILES, locate_folder
from tbac.models.uniimage import UniImage
from tbac.models.weights import WeightFiles, strip_mllm_prefix

MODEL_TYPE = "tbacuniimage"
TABLE = "model.mllm_backbone.model.embed_tokens.weight"
CONNECTOR = "model.connector."
TRANSFORMER = "model.transformer."
AUTOENCODER = "vae."
MLLM = "model.mllm_backbone."
MAX_QUERIES = 2**16
NAMED = 8  # tensors named in one message


@dataclass(frozen=True)
class Accounting:
    """What became of the tensors of a released checkpoint.

    Attributes:
        used: names of those that were taken into the model.
        dropped: names of those that were left out, since they equal the base model's bit for bit.
        unused_rows: number of rows of the embedding table behind the queries, which are never read.
    """

    used: tuple[str, ...]
    dropped: tuple[str, ...]
    unused_rows: int


def read_released(
    checkpoint: str | Path,
    mllm: str,
    denoiser: str,
    image_pixels: int = 256 * 28 * 28,
) -> tuple[UniImage, Accounting]:
    """Turn the released checkpoint into a UniImage in float32.

    Args:
        checkpoint: folder with the release's `config.json` and safetensors.
        mllm: folder or hub id of the Qwen2.5-VL that it was trained on.
        denoiser: folder or hub id of the SANA that it was trained on.
        image_pixels: area of each input image, which the release has in its code and not in its config.

    Raises:
        ValueError: when the folder isn't such a checkpoint, or a tensor is missing, unexpected, of another shape, or
            frozen and yet different from the base model's; by name.
    """
    folder = expand_path(checkpoint, "checkpoint")
    options = read_released_config(folder)
    config = ModelConfig(
        mllm=mllm,
        denoiser=denoiser,
        image_pixels=image_pixels,
        num_queries=options["num_metaqueries"],
        max_text_tokens=options.get("max_input_text_tokens", 256),
        system_prompt=options.get("system_prompt"),
    )
    parts, plan = check_config(config, opened=True)
    num_queries = config.num_queries
    files = WeightFiles(folder)
    mllm_folder = locate_folder("mllm", mllm, MLLM_FILES)
    denoiser_folder = locate_folder("denoiser", denoiser, DENOISER_FILES)

    # The base models say which tensors the checkpoint must hold: those that were trained and those that are frozen.
    with init_empty_weights(include_buffers=False):
        transformer = SanaTransformer2DModel(**parts.transformer)
        ladder = Ladder(plan, num_queries, parts.hidden_size, parts.caption_channels, config.ladder)
    base_mllm, base_vae = WeightFiles(mllm_folder), WeightFiles(denoiser_folder / "vae")
    base_shapes = base_mllm.read_shapes()
    vocabulary = next((s[0] for n, s in base_shapes.items() if strip_mllm_prefix(n) == "embed_tokens.weight"), 0)
    expected = {
        **{CONNECTOR + k: tuple(v.shape) for k, v in ladder.connector.state_dict().items()},
        **{TRANSFORMER + k: tuple(v.shape) for k, v in transformer.state_dict().items()},
        **{AUTOENCODER + k: v for k, v in base_vae.read_shapes().items()},
        **{make_released_name(k): v for k, v in base_shapes.items() if strip_mllm_prefix(k) != "lm_head.weight"},
    }
    # The table's number of rows may differ, so it is checked apart from the others.
    expected.pop(TABLE, None)
    rows = check_names(folder, files.read_shapes(), expected, vocabulary + num_queries, parts.hidden_size)

    # Frozen tensors must equal those of the base models, from which they will be read.
    dropped = [
        *check_frozen_tensors(folder, files, base_mllm, {make_released_name(n): n for n in base_shapes}, mllm),
        *check_frozen_tensors(folder, files, base_vae, {AUTOENCODER + n: n for n in base_vae.file_of}, denoiser),
    ]
    # Trained tensors get this project's names; the queries are the rows behind the vocabulary.
    taken = files.read(lambda name: name == TABLE or name.startswith((CONNECTOR, TRANSFORMER)))
    table = taken[TABLE].float()
    state = {"ladder.queries": table[vocabulary : vocabulary + num_queries].clone()}
    for prefix, place in ((CONNECTOR, "ladder.connector."), (TRANSFORMER, "denoiser.transformer.")):
        state |= {place + k.removeprefix(prefix): v.float() for k, v in taken.items() if k.startswith(prefix)}
    table = table[:vocabulary].clone()
    model = UniImage.from_saved(SavedModel(replace(config, taps=plan), None, state, str(folder), table))
    return model, Accounting(tuple(sorted(taken)), tuple(sorted(dropped)), rows - vocabulary - num_queries)


def read_released_config(folder: Path) -> dict[str, Any]:
    """Read and check the release's `config.json`.

    Raises:
        ValueError: when it isn't there, isn't the release's, or lacks what is needed.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"checkpoint={folder}: no config.json; give the folder of the released checkpoint")
    config = read_json(file, kind=dict)
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{file}: model_type must be {MODEL_TYPE!r}, got {config.get('model_type')!r}")
    queries = config.get("num_metaqueries")
    if not isinstance(queries, int) or isinstance(queries, bool) or not 1 <= queries <= MAX_QUERIES:
        raise ValueError(f"{file}: num_metaqueries must be a positive whole number, got {shorten(queries)}")
    if config.get("loss_type", "flow") != "flow":
        raise ValueError(f"{file}: loss_type must be 'flow', got {config['loss_type']!r}")
    # The types of the other options are checked by `ModelConfig`, which is made of them.
    return config


def make_released_name(name: str) -> str:
    """Make the name that an MLLM tensor has in the release (the layout of transformers 4.51)."""
    name = strip_mllm_prefix(name)
    return MLLM + (name if name.startswith("visual.") else f"model.{name}")


def check_names(
    folder: Path,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    needed_rows: int,
    hidden_size: int,
) -> int:
    """Raise ValueError for missing, unexpected or misshapen tensors; return the number of rows of the embedding table.

    Args:
        folder: of the checkpoint, for messages.
        found: shapes of the checkpoint's tensors, by name.
        expected: shapes that they must have, without the embedding table.
        needed_rows: rows that the embedding table must have at least.
        hidden_size: width of the embedding table.
    """
    table = found.get(TABLE)
    problems = [f"missing {name}" for name in sorted({*expected, TABLE}) if name not in found]
    problems += [f"unexpected {name}" for name in sorted(found) if name not in expected and name != TABLE]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in sorted(expected.items())
        if name in found and found[name] != shape
    ]
    if table is not None and (len(table) != 2 or table[0] < needed_rows or table[1] != hidden_size):
        problems.append(f"{TABLE} has shape {table}, expected at least ({needed_rows}, {hidden_size})")
    if problems:
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise ValueError(f"checkpoint={folder} isn't what its base models ask for: {'; '.join(problems[:NAMED])}{more}")
    assert table is not None
    return table[0]


def check_frozen_tensors(
    folder: Path, files: WeightFiles, base: WeightFiles, base_name_of: Mapping[str, str], source: str
) -> list[str]:
    """Compare frozen tensors with the base model's and return their names.

    Args:
        folder: of the checkpoint, for messages.
        files: the checkpoint's tensors.
        base: the base model's tensors.
        base_name_of: name in the checkpoint -> name in the base model.
        source: the base model, for messages.

    Raises:
        ValueError: naming the tensors that differ.
    """
    equal: list[str] = []
    different: list[str] = []
    for name, base_name in sorted(base_name_of.items()):
        if name == TABLE or name not in files.file_of:
            continue
        # The checkpoint may have been saved in another type; in one of the two types they must be equal.
        ours, theirs = files.read_tensor(name), base.read_tensor(base_name)
        same = torch.equal(ours, theirs.to(ours.dtype)) or torch.equal(ours.to(theirs.dtype), theirs)
        (equal if same else different).append(name)
    if different:
        more = f" and {len(different) - NAMED} more" if len(different) > NAMED else ""
        raise ValueError(
            f"checkpoint={folder}: frozen tensors differ from those of {source}: {', '.join(different[:NAMED])}{more}; "
            "give the base model that it was trained on"
        )
    return equal

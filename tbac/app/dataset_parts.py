"""The options of layouts of datasets, of their conversion, and of the offline worlds."""

from tbac.app.groups import Fields, Part, counts, shares
from tbac.app.kinds import choice, flag, list_of, number, optional, path, text, whole

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
            "pairs_per_type", "rewards",
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
            "t2i", "edit", "curated", "val", "samples_per_shard", "prompts_per_tag", "dense", "edits", "questions",
            "rewards",
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

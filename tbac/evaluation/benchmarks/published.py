"""Published numbers that reports show beside ours, and how they were reached, from the papers and repositories."""

from tbac.evaluation.protocol import OF_SERVICE, Protocol

REWRITTEN = "†"  # after the name of a model whose prompts were rewritten before it drew them

TBAC = "TBAC-UniImage-3B"
GENEVAL = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
IMGEDIT = ("add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action")
WISE = ("culture", "time", "space", "biology", "physics", "chemistry")


def _build_row(names: tuple[str, ...], values: tuple[float, ...], overall: float) -> dict[str, float]:
    """Build name -> score, `overall` first."""
    return {"overall": overall, **dict(zip(names, values, strict=True))}


_TIIF = {
    "overall, short": 62.37, "overall, long": 61.18, "basic, short": 75.92, "basic, long": 73.97,
    "advanced, short": 62.91, "advanced, long": 65.03, "real_world, short": 56.72, "real_world, long": 57.84,
}  # fmt: skip

PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "geneval": {
        TBAC: _build_row(GENEVAL, (0.99, 0.94, 0.77, 0.92, 0.83, 0.75), 0.87),
        "MetaQuery-L †": {"overall": 0.78},
        "MetaQuery-XL †": {"overall": 0.80},
        "BLIP3-o-8B": {"overall": 0.84},
        "OpenUni-B-512": _build_row(GENEVAL, (0.99, 0.91, 0.74, 0.90, 0.77, 0.73), 0.84),
        "BAGEL †": _build_row(GENEVAL, (0.98, 0.95, 0.84, 0.95, 0.78, 0.77), 0.88),
    },
    "dpg": {
        TBAC: {"overall": 80.97},
        "MetaQuery-L": {"overall": 81.10},
        "MetaQuery-XL": {"overall": 82.05},
        "BAGEL": {"overall": 85.07},
    },
    "tiif_mini": {TBAC: _TIIF},
    "imgedit": {
        TBAC: {"overall": 3.25},
        "BAGEL": _build_row(IMGEDIT, (3.56, 3.31, 1.70, 3.30, 2.62, 3.24, 4.49, 2.38, 4.17), 3.20),
        "UniWorld-V1": _build_row(IMGEDIT, (3.82, 3.64, 2.27, 3.47, 3.24, 2.99, 4.21, 2.96, 2.74), 3.26),
        "OmniGen2": _build_row(IMGEDIT, (3.57, 3.06, 1.77, 3.74, 3.20, 3.57, 4.81, 2.52, 4.68), 3.44),
    },
    "wise": {
        "MetaQuery-XL": _build_row(WISE, (0.56, 0.55, 0.62, 0.49, 0.63, 0.41), 0.55),
        "OpenUni-L-512": _build_row(WISE, (0.51, 0.49, 0.64, 0.48, 0.63, 0.35), 0.52),
        "BAGEL": _build_row(WISE, (0.44, 0.55, 0.68, 0.44, 0.60, 0.39), 0.52),
    },
    "wise_verified": {
        "BAGEL": _build_row(WISE, (0.4125, 0.3500, 0.3083, 0.2000, 0.4417, 0.2583), 0.3520),
        "UniWorld-V1": _build_row(WISE, (0.5150, 0.4917, 0.5500, 0.2250, 0.4000, 0.1667), 0.4260),
        "DeepGen 1.0": _build_row(WISE, (0.6500, 0.4100, 0.7200, 0.3900, 0.5900, 0.4500), 0.5700),
        "FLUX.2-dev": _build_row(WISE, (0.6650, 0.5667, 0.6583, 0.3667, 0.5250, 0.3750), 0.5650),
    },
}

GPT_4O = ("gpt-4o", "gpt-4o-2024-05-13", "gpt-4o-2024-08-06", "gpt-4o-2024-11-20")  # as services call it
# Digests of prompts, questions and system messages are those of the published files and scripts. The digest of a local
# judge's weights isn't known here, so it is said which ones they are; `benchmark.published_protocol` may say it.
PROTOCOLS: dict[str, Protocol] = {
    "geneval": Protocol(
        judge="Mask2Former and CLIP",
        judge_weights="mmdetection's mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco and OpenAI's ViT-L-14",
        judge_settings="thresholds 0.3 and 0.9",
        prompts="sha256:fd61687b5a7f8279",
        questions="sha256:bdcdcca9edd06f37",
        rules="GenEval's rules",
        num_prompts=553,
        samples=4,
    ),
    "dpg": Protocol(
        judge="mplug_visual-question-answering_coco_large_en",
        judge_weights="those of mPLUG-large on ModelScope",
        judge_settings="its defaults",
        prompts="sha256:6149816930d52aec",
        questions="those of dpg_bench.csv alone",
        rules="official rules",
        num_prompts=1065,
        samples=4,
    ),
    "tiif": Protocol(
        judge=GPT_4O,
        judge_weights=OF_SERVICE,
        judge_settings="system message 84fd78b8, temperature 1, no limit of length",
        prompts="sha256:6727d6ab43a1010c",
        questions="sha256:d2f5849ceca30d40",
        rules="TIIF-Bench's averages",
        num_prompts=5076,
        samples=1,
    ),
    "tiif_mini": Protocol(
        judge=GPT_4O,
        judge_weights=OF_SERVICE,
        judge_settings="system message 84fd78b8, temperature 1, no limit of length",
        prompts="sha256:1d9382bd48e1a7d3",
        questions="sha256:1bac9587f960d295",
        rules="TIIF-Bench's averages",
        num_prompts=554,
        samples=1,
    ),
    "imgedit": Protocol(
        judge=GPT_4O,
        judge_weights=OF_SERVICE,
        prompts="sha256:c2813e89a74e52dd",
        questions="sha256:38105d72bf7d260c",
        rules="ImgEdit's rules",
        num_prompts=737,
        samples=1,
    ),
    "wise": Protocol(
        judge="gpt-4o-2024-05-13",
        judge_weights=OF_SERVICE,
        judge_settings="system message 1034e394, temperature 0, at most 2000 tokens",
        prompts="sha256:c068b1a31653a75a",
        questions="sha256:0f1dad4a3bce0f49",
        rules="WISE, the first edition",
        num_prompts=1000,
        samples=1,
    ),
    "wise_verified": Protocol(
        judge=("Qwen3.5-35B-A3B", "Qwen/Qwen3.5-35B-A3B"),
        judge_weights=OF_SERVICE,
        judge_settings="system message c9b9e5e1, temperature 0, at most 500 tokens, "
        "chat_template_kwargs {'enable_thinking': False}",
        prompts="sha256:02f5adb36f5fabdb",
        questions="sha256:d9f43728f390a82c",
        rules="WISE, the verified edition",
        num_prompts=1000,
        samples=1,
    ),
    "geneval2": Protocol(
        judge=("Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"),
        judge_weights=(OF_SERVICE, "those of Qwen3-VL-8B-Instruct"),
        prompts="sha256:83159aedf6ff6087",
        questions="sha256:adb656b6d7b02573",
        rules="Soft-TIFA",
        num_prompts=800,
        samples=1,
    ),
    "unigenbench": Protocol(
        judge=("gemini-2.5-pro", "google/gemini-2.5-pro"),
        judge_weights=OF_SERVICE,
        prompts="sha256:d8ea1d90a87f8bd7",
        questions="sha256:df0632efeaa0f3f0",
        rules="UniGenBench's rules",
        num_prompts=600,
        samples=4,
    ),
    "corebench": Protocol(
        judge=("gemini-2.5-flash", "google/gemini-2.5-flash"),
        judge_weights=OF_SERVICE,
        prompts="sha256:e34b0efdca1ff03f",
        questions="sha256:9e391126ab59cb98",
        rules="T2I-CoReBench's rules",
        num_prompts=1080,
        samples=4,
    ),
    "longtext": Protocol(
        judge=("Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        judge_weights=(OF_SERVICE, "those of Qwen2.5-VL-7B-Instruct"),
        prompts="sha256:616e80a6bb6d09df",
        questions="sha256:032b1f5f41c47bc3",
        rules="LongText-Bench's rules",
        num_prompts=160,
        samples=4,
    ),
    "gedit": Protocol(
        judge=("gpt-4.1", "gpt-4.1-2025-04-14"),
        judge_weights=OF_SERVICE,
        prompts="those of the data set stepfun-ai/GEdit-Bench",
        rules="VIEScore, instructions in en",
        num_prompts=606,
        samples=1,
    ),
}

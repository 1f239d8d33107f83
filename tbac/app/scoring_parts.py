"""The options of benchmarks, of judges and detectors, of rewards, and of the captions that a probe reads."""

from tbac.app.groups import DEVICE, PROBABILITY, Fields, Part, Parts, counts
from tbac.app.kinds import choice, flag, name, number, optional, path, pattern, plain_mapping, seed, text, whole
from tbac.models.checks import DTYPE_NAMES, QUANTIZATIONS

# What a benchmark of the user's own has too.
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
        f"{BENCHMARKS}.variety.Variety": {**DRAWING, "file": path(), "samples": whole(2)},
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
            "model": text(), "max_retries": whole(0), "timeout": number(above=0), "max_tokens": optional(whole()),
            "temperature": optional(number(least=0)),
        },
        f"{JUDGES}.qwen.QwenJudge": {
            "mllm": path(),
            "device": DEVICE,
            "dtype": choice(*DTYPE_NAMES),
            "quantization": optional(choice(*QUANTIZATIONS)),
            **counts("image_pixels", "max_text_tokens"),
            "max_new_tokens": optional(whole()),
        },
        f"{JUDGES}.ocr.OcrJudge": {"min_score": PROBABILITY, "least_side": whole()},
        f"{DETECTORS}.mask2former.Mask2FormerDetector": {"segmenter": path(), "clip": path(), "device": DEVICE},
        f"{DETECTORS}.template.TemplateDetector.from_world": {"path": path()},
    }
)  # fmt: skip
CAPTIONS = Part(
    {
        "data_prep.shapes.captions.draw_captions": {"seed": seed(), "count": whole()},
        "data_prep.words.captions.draw_captions": {"seed": seed(), "count": whole()},
        "tbac.evaluation.captions.read_table": {"path": path()},
    }
)
REWARDS = "tbac.evaluation.rewards"
WEIGHT: Fields = {"weight": number(above=0)}
BENCHMARK_REWARD: Fields = {"benchmark": BENCHMARK, "judge": JUDGE, "threads": whole()}
REWARD = Parts(
    Part(
        {
            f"{REWARDS}.BenchmarkReward": {**WEIGHT, **BENCHMARK_REWARD},
            f"{REWARDS}.JudgeReward": {
                **WEIGHT, "judge": JUDGE, "question": text(), "probability": flag(), **counts("threads", "tries"),
            },
            f"{REWARDS}.RandomReward": {
                **WEIGHT, "seed": seed(), "levels": optional(whole(2)),
                "reward": Part({f"{REWARDS}.BenchmarkReward": BENCHMARK_REWARD}),
            },
        },
        common=WEIGHT,
    )
)  # fmt: skip

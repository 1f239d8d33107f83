"""Published numbers that reports show beside ours, from the papers and repositories; † means rewritten prompts."""

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
}

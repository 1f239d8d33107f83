"""The benchmarks by name."""

from collections.abc import Mapping

from tbac.evaluation.benchmarks.base import Benchmark
from tbac.evaluation.benchmarks.dpg import DPG
from tbac.evaluation.benchmarks.geneval import GenEval
from tbac.evaluation.benchmarks.imgedit import ImgEdit
from tbac.evaluation.benchmarks.prompts import Folder
from tbac.evaluation.benchmarks.tiif import TIIF
from tbac.evaluation.benchmarks.wise import WISE

SUITES: Mapping[str, type[Benchmark]] = {
    "geneval": GenEval,
    "dpg": DPG,
    "tiif": TIIF,
    "tiif_mini": TIIF,
    "imgedit": ImgEdit,
    "wise": WISE,
    "folder": Folder,
}

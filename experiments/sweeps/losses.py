"""What a plain multirun ends with: the validation losses of its points, side by side.

A multirun by `make sweep` is scored after it, and has a report instead.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from tbac.app.multirun import PointsCallback

if TYPE_CHECKING:
    from experiments.sweeps.points import Point


class TellLosses(PointsCallback):
    """Hydra's callback that prints the losses of a multirun's points."""

    def tell_points(self, config: DictConfig, varied: Sequence[str]) -> None:
        """Print the table; nothing where another command has begun the multirun, or no point is finished."""
        from experiments.sweeps.points import read_points
        from tbac.training.interruptions import outlast_terminal

        points = [] if config.parent_run_id else read_points(Path(config.hydra.sweep.dir), list(varied))
        with outlast_terminal():
            print("".join(f"\n{part}\n" for part in describe_losses(points)), end="")


def describe_losses(points: Sequence["Point"]) -> list[str]:
    """Describe the losses of points: a table by group, lowest first, and the differences of pairs where there are any.

    Args:
        points: finished; those whose runs had no validation are left out.
    """
    from experiments.reports import format_table
    from experiments.sweeps.pairs import LOSS, tabulate_comparisons
    from experiments.sweeps.points import group_by_choices
    from experiments.sweeps.report import describe_spread

    validated = [point for point in points if point.stages[-1].get("val_loss_last") is not None]
    if not validated:
        return []
    for point in validated:
        point.scores["loss"] = point.stages[-1]["val_loss_last"]
    # A row for each group, the lowest loss first.
    rows = []
    for name, of_group in group_by_choices(validated).items():
        losses = [point.scores["loss"] for point in of_group]
        rows.append((mean(losses), [name, len(losses), describe_spread(losses, 4)]))
    table = format_table(["point", "runs", "validation loss"], [row for _, row in sorted(rows)])
    return [table, *filter(None, [tabulate_comparisons(validated, [LOSS])])]

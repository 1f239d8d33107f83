"""A committed multirun, scored, with its report: python experiments/sweep.py name=taps_x_lr"""

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from experiments.sweeps.points import describe_failures, read_choices, read_failures, read_points
from tbac.app import FAILED, check, claim_folder, command, compose_checked, make_part, note_failure, to_plain
from tbac.files import write_whole

log = logging.getLogger(__name__)
TRAIN = Path(__file__).parent / "train.py"


def build_world(name: str, cfg: DictConfig) -> None:
    """Build one of the offline worlds; what that takes is imported only then."""
    if name == "shapes":
        from data_prep.shapes import parts as shapes

        shapes.build_world(cfg)
    else:
        from data_prep.words import parts as words

        words.build_world(cfg)


@dataclass(frozen=True)
class Trained:
    """What a sweep trains.

    Attributes:
        world: the choice of the group `world`.
        stage: the choice of the group `stage`.
        mllm: folder of its MLLM.
    """

    world: str
    stage: str
    mllm: Path


def read_trained(sweep: str) -> Trained:
    """Read what a committed sweep trains from the config of its points.

    Raises:
        ValueError: for options that training can't be started with.
    """
    # Where a point begins may follow from the name of its own folder, which this command hasn't.
    train = compose("train", [f"sweep={sweep}", "run_dir=.", "init=null"], return_hydra_config=True)
    chosen = train.hydra.runtime.choices
    with open_dict(train):
        del train["hydra"]
    check("train", train)
    return Trained(chosen["world"], chosen["stage"], Path(train.model.mllm))


def build_world_if_missing(cfg: DictConfig, mllm: Path) -> None:
    """Build the offline world whose MLLM this is if it is missing, so that a sweep runs in a fresh clone."""
    for name, options in {"shapes": [], "words": ["install=true"]}.items():
        world = compose_checked(name, options)
        if Path(world.out) in mllm.parents and not mllm.is_dir():
            log.info("%s trains on the world data_prep/%s, which is built first", cfg.name, name)
            build_world(name, world)


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process; Ctrl-C reaches it too, and it decides when it ends, with everything saved."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def train_points(cfg: DictConfig, out: Path, parent_run_id: str | None) -> None:
    """Train every point that isn't finished yet, each as a child of the parent run.

    Raises:
        SystemExit: when a signal has stopped the multirun.
        ValueError: when it ended before any point had a folder.
    """
    before = time.time()
    command = [
        sys.executable, str(TRAIN), "-m", f"sweep={cfg.name}", f"hydra.sweep.dir={out}",
        f"parent_run_id={parent_run_id or 'null'}", *cfg.overrides,
    ]  # fmt: skip
    # In the environment, since anyone may read a command line, and the address may hold a password.
    environment = {**os.environ, "MLFLOW_TRACKING_URI": cfg.tracking_uri}
    status = wait_for(subprocess.Popen(command, env=environment))
    if not status:
        return
    if status < 0 or status >= 128:
        print(f"to go on: make sweep SWEEP={cfg.name}, with the same ARGS", file=sys.stderr)
        raise SystemExit(128 - status if status < 0 else status)
    # Points that failed are told in the report.
    failed_now = [file for file in out.glob(f"*/{FAILED}") if file.stat().st_mtime >= before]
    if not failed_now:
        raise ValueError(f"the training of {cfg.name} ended with status {status}; the same command goes on from there")


def choose_scoring(cfg: DictConfig, trained: Trained) -> DictConfig:
    """Compose the command's config again with the scoring of what the sweep trains, unless the user has chosen one.

    A scoring that is named by world and stage comes before that of the world. What the user gave wins over what the
    scoring says.
    """
    known = GlobalHydra.instance().config_loader().get_group_options("scoring")
    fitting = [name for name in (f"{trained.world}_{trained.stage}", trained.world) if name in known]
    if HydraConfig.get().runtime.choices.get("scoring") or not fitting:
        return cfg
    return compose_checked("sweep", [*HydraConfig.get().overrides.task, f"scoring={fitting[0]}"])


@command("sweep")
def main(cfg: DictConfig) -> None:
    # A wrong name is an error before anything is built or trained.
    choices = read_choices(cfg.name)
    trained = read_trained(cfg.name)
    cfg = choose_scoring(cfg, trained)
    known = GlobalHydra.instance().config_loader().get_group_options("benchmark")
    unknown = sorted(set(cfg.suites) - set(known))
    if unknown:
        raise ValueError(f"suites={unknown} must be some of {', '.join(known)}")
    # Torch, diffusers and matplotlib are imported only when the config is right.
    from experiments.sweeps.report import Completeness, write_report
    from experiments.sweeps.score import list_metrics, score_point
    from tbac.training.tracking import (
        SCORE,
        add_to_run,
        get_comparison_link,
        get_runs_link,
        open_parent_run,
        read_metric_history,
    )

    build_world_if_missing(cfg, trained.mllm)
    out = Path(cfg.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    expected = prod(map(len, choices.values()))
    with claim_folder(out), open_parent_run(cfg.tracking_uri, "tbac", cfg.name, str(out / "mlflow_run_id")) as run:
        run.log_config(to_plain(cfg))
        train_points(cfg, out, run.run_id)
        points = read_points(out, list(choices))
        if len(points) < expected:
            log.warning("%d of %d points are finished", len(points), expected)
        if not points:
            raise ValueError(f"no point of {cfg.name} is finished: {describe_failures(read_failures(out))}")
        # Scores of every point that is finished, and what it logged while it trained.
        detector = make_part(cfg.judge, "judge")
        histories: dict[Path, dict[str, Any]] = {}
        for number, point in enumerate(points, start=1):
            try:
                point.scores = score_point(point, cfg, detector)
            except (ValueError, OSError) as error:
                note_failure(point.folder, f"it can't be scored: {error}")
                continue
            histories[point.folder] = read_metric_history(cfg.tracking_uri, point.run_id) if point.run_id else {}
            if point.run_id:
                add_to_run(cfg.tracking_uri, point.run_id, list_metrics(point), point.steps)
            log.info("%d/%d %s: %s", number, len(points), point.folder.name, point.scores["geneval"]["overall"])
        # The report, beside the points and in the parent run.
        points = [point for point in points if point.scores]
        if not points:
            raise ValueError(f"no point of {cfg.name} could be scored: {describe_failures(read_failures(out))}")
        failures = read_failures(out)
        report = write_report(cfg.name, points, histories, out, Completeness(expected, failures))
        summary = [{"choices": p.choices, "report": p.report, "scores": p.scores} for p in points]
        write_whole(out / "report.json", (json.dumps(summary, indent=2) + "\n").encode())
        for file in [report, out / "report.json", *sorted(out.glob("*.png"))]:
            run.log_file(file)
    print(f"\n{report.read_text()}\nThe report is {report}.")
    if run.run_id:
        print(f"make ui serves its runs: {get_runs_link(cfg.tracking_uri, parent_run_id=run.run_id, score=SCORE)}")
        print(f"beside each other: {get_comparison_link(cfg.tracking_uri, run.run_id)}")
    if failures:
        print(f"error: {len(points)} of {expected} points are finished: {describe_failures(failures)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

"""What the spike rules promise when training changes for good, not for a step: a table by simulation.

python experiments/studies/guard/simulate.py

Norms and losses are drawn from a log-normal distribution around 1, changed as the scenario says from step 200 on, and
shown to a rule one after the other. As in training, a run ends when 50 of the last 1000 steps were rejected. The real
guard would also go back to a checkpoint after five rejected steps in a row, which changes weights and so the norms;
here the steps come as they come.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from omegaconf import DictConfig

from experiments.reports import format_table
from tbac.app import command
from tbac.training.spikes import RobustRule, RunningMeanRule, SpikeRule

STEPS, CHANGE = 2000, 200
MAX_REJECTS, OVER = 50, 1000  # those of conf/callbacks/guard.yaml
Change = Callable[[int, Random], float]  # step, random numbers -> what the ordinary value is multiplied by


@dataclass(frozen=True)
class Scenario:
    """A lasting change of training.

    Attributes:
        title: what it is, for the table.
        norm: what it does to the gradient norm.
        loss: what it does to the loss.
        spread: standard deviation of the logarithm of the norm.
    """

    title: str
    norm: Change
    loss: Change
    spread: float = 0.1


@dataclass(frozen=True)
class Outcome:
    """How a rule met a scenario.

    Attributes:
        rejected: steps that it rejected.
        stopped: step at which the run ended, or None.
        last_rejected: the last step that it rejected, or None.
    """

    rejected: int
    stopped: int | None
    last_rejected: int | None

    def describe(self) -> str:
        """Describe it for the table."""
        if not self.rejected:
            return "all pass"
        if self.stopped is not None:
            return f"run stopped, {self.stopped - CHANGE} steps after the change"
        return f"{self.rejected} rejected, the last one {(self.last_rejected or 0) - CHANGE} steps after the change"


def keep(step: int, draw: Random) -> float:
    """Change nothing."""
    return 1.0


def jump(factor: float) -> Change:
    """Multiply every value from the change on."""
    return lambda step, draw: factor if step >= CHANGE else 1.0


def mix(share: float, factor: float) -> Change:
    """Multiply a share of the values from the change on."""
    return lambda step, draw: factor if step >= CHANGE and draw.random() < share else 1.0


def drift(factor: float) -> Change:
    """Multiply each value from the change on by a factor more than the one before, up to 10^30."""
    return lambda step, draw: min(factor ** max(0, step - CHANGE), 1e30)


def begin_at(value: float, steps: int) -> Change:
    """Begin with a constant instead of 1."""
    return lambda step, draw: value if step < steps else 1.0


SCENARIOS = {
    "calm": Scenario("nothing changes", keep, keep),
    "wide": Scenario("nothing changes, and norms have a spread of 0.8 instead of 0.1", keep, keep, 0.8),
    "jump_6": Scenario("the norm jumps to 6 times its level", jump(6), keep),
    "jump_15": Scenario("the norm jumps to 15 times its level", jump(15), keep),
    "jump_both": Scenario("norm and loss jump to 6 times their level", jump(6), jump(6)),
    "jump_1000": Scenario("the norm jumps to 1000 times its level", jump(1000), keep),
    "loss_1000": Scenario("the loss jumps to 1000 times its level", keep, jump(1000)),
    "drop": Scenario("the norm drops to a hundredth", jump(0.01), keep),
    "tenth_6": Scenario("a tenth of the batches has a norm 6 times as large", mix(0.1, 6), keep),
    "tenth_15": Scenario("a tenth of the batches has a norm 15 times as large", mix(0.1, 15), keep),
    "twentieth_6": Scenario("a twentieth of the batches has a norm 6 times as large", mix(0.05, 6), keep),
    "half_6": Scenario("half of the batches has a norm 6 times as large", mix(0.5, 6), keep),
    "rare_6": Scenario("one batch of 200 has a norm 6 times as large", mix(0.005, 6), keep),
    "rare_1000": Scenario("one batch of 200 has a norm 1000 times as large", mix(0.005, 1000), keep),
    "tenth_1000": Scenario("a tenth of the batches has a norm 1000 times as large", mix(0.1, 1000), keep),
    "drift_1.01": Scenario("the norm grows by 1 % a step", drift(1.01), keep),
    "drift_1.05": Scenario("the norm grows by 5 % a step", drift(1.05), keep),
    "drift_1.2": Scenario("the norm grows by 20 % a step", drift(1.2), keep),
    "loss_1.05": Scenario("the loss grows by 5 % a step", keep, drift(1.05)),
    "zeros": Scenario("norms of 0 in the first 40 steps", begin_at(0.0, 40), keep),
    "all_zeros": Scenario("norms and losses of 0 in the first 40 steps", begin_at(0.0, 40), begin_at(0.0, 40)),
    "nan": Scenario("every norm is NaN", jump(math.nan), keep),
}


def simulate(rule: SpikeRule, scenario: Scenario, seed: int = 0) -> Outcome:
    """Show a scenario to a rule, step by step, until the run would end."""
    draw = Random(seed)
    recent: deque[bool] = deque(maxlen=OVER)
    rejected, last = 0, None
    for step in range(STEPS):
        norm = scenario.norm(step, draw) * math.exp(draw.gauss(0, scenario.spread))
        loss = scenario.loss(step, draw) * math.exp(draw.gauss(0, 0.1))
        recent.append(rule.judge(norm, loss).reason is not None)
        if recent[-1]:
            rejected, last = rejected + 1, step
        if sum(recent) >= MAX_REJECTS:
            return Outcome(rejected, step, last)
    return Outcome(rejected, None, last)


@command("study/guard")
def main(cfg: DictConfig) -> None:
    rows = []
    for scenario in SCENARIOS.values():
        outcomes = [simulate(rule(), scenario) for rule in (RobustRule, RunningMeanRule)]
        rows.append([scenario.title, *(outcome.describe() for outcome in outcomes)])
    print(format_table(["from step 200 on", "`guard=robust`", "`guard=running_mean`"], rows))


if __name__ == "__main__":
    main()

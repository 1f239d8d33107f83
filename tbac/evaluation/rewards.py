"""Rewards that a model can learn from: a benchmark's rules, a judge's opinion, and for comparison chance.

Each has the methods of `tbac.types.Reward`. One of your own is a class with these in any module, and a YAML in
`conf/reward/` that names it.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from tbac.evaluation.benchmarks.base import PictureBenchmark
from tbac.evaluation.benchmarks.rows import ScoreError
from tbac.evaluation.judges.base import Asked, JudgeError, JudgeRefusedError, ask_until_usable, read_yes_or_no
from tbac.evaluation.judges.detector import answer_by_detection
from tbac.evaluation.picture_tree import Target
from tbac.types import PicturePrompt, RewardError

QUESTION = 'Does this picture show exactly what this text asks for: "{prompt}"? Answer with yes or no.'


class JudgedReward(ABC):
    """What rewards by a judge share: several pictures at once, and what happens when the judge fails.

    A picture whose replies can't be used has no score. When the judge gives no reply at all, the pictures that have a
    score keep it, so that the next call asks about the others alone.

    Args:
        judge: is asked.
        threads: pictures that are judged at the same time.

    Raises:
        ValueError: for a number of threads below 1.
    """

    def __init__(self, judge: Any, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"threads of a reward must be at least 1, got {threads}")
        self.judge, self.threads = judge, threads
        self._known: dict[tuple[PicturePrompt, bytes], float | None] = {}

    @abstractmethod
    def judge_one(self, prompt: PicturePrompt, picture: Image.Image) -> float | None:
        """Score one picture; None where there is no score.

        Raises:
            JudgeError: when the judge gives no usable reply.
        """

    def score(self, prompts: Sequence[PicturePrompt], pictures: Sequence[Image.Image]) -> list[float | None]:
        """Score pictures.

        Raises:
            RewardError: when a judge that is asked over a network, or otherwise slow, gives no reply.
            ValueError: when one that always says the same can't judge.
        """
        keys = [(prompt, compute_digest(picture)) for prompt, picture in zip(prompts, pictures, strict=True)]
        wanted = dict(zip(keys, pictures, strict=True))
        unknown = [key for key in wanted if key not in self._known]
        with ThreadPoolExecutor(self.threads) as pool:
            problems = list(pool.map(lambda key: self._find_score(key, wanted[key]), unknown))
        problem = next((problem for problem in problems if problem), "")
        if problem:
            failure = RewardError if getattr(self.judge, "slow", False) else ValueError
            raise failure(problem)
        scores = [self._known[key] for key in keys]
        self._known.clear()
        return scores

    def _find_score(self, key: tuple[PicturePrompt, bytes], picture: Image.Image) -> str:
        """Find the score of a picture and note it; returns what went wrong, or nothing."""
        try:
            self._known[key] = self.judge_one(key[0], picture)
        except JudgeRefusedError as error:
            return str(error)
        except JudgeError as error:
            if not error.replies:
                return str(error)
            self._known[key] = None
        except ScoreError:
            self._known[key] = None
        return ""


class BenchmarkReward(JudgedReward):
    """A benchmark's score of each picture, for the benchmark's own prompts.

    Args:
        benchmark: lists the prompts, and judges a picture.
        judge: of the kind that the benchmark needs; a detector also answers questions.
        threads: pictures that are judged at the same time.

    Raises:
        ValueError: when the judge is of another kind.
    """

    def __init__(self, benchmark: PictureBenchmark, judge: Any, threads: int = 1) -> None:
        if not isinstance(benchmark, PictureBenchmark):
            raise ValueError(f"the benchmark of a reward must be one of pictures, got {type(benchmark).__name__}")
        if benchmark.needs in ("questions", "probabilities"):
            judge = answer_by_detection(judge)
        super().__init__(benchmark.prepare_judge(judge), threads)
        self.benchmark = benchmark
        self.targets: dict[PicturePrompt, Target] = {}
        for target in benchmark.targets:
            self.targets.setdefault(PicturePrompt(target.prompt, target.images), target)

    def list_prompts(self) -> list[PicturePrompt]:
        """List the benchmark's prompts, each once."""
        return list(self.targets)

    def judge_one(self, prompt: PicturePrompt, picture: Image.Image) -> float | None:
        """Score one picture by the benchmark's rules."""
        return self.benchmark.judge_sample(self.targets[prompt], picture, self.judge).score


class JudgeReward(JudgedReward):
    """A judge's opinion of whether a picture shows what its prompt says, for any prompt.

    Args:
        judge: answers questions.
        question: has `{prompt}` where the text belongs.
        probability: the score is the probability of "yes", which the judge must tell; else it is 1 or 0.
        threads: pictures that are judged at the same time.
        tries: how often the judge is asked for a reply that can be used.

    Raises:
        ValueError: for a judge that answers no questions, and a question without a place for the prompt.
    """

    def __init__(
        self, judge: Any, question: str = QUESTION, probability: bool = True, threads: int = 1, tries: int = 3
    ) -> None:
        needed = "compute_probability" if probability else "ask"
        if not hasattr(judge, needed):
            raise ValueError(
                f"a reward with probability={str(probability).lower()} needs a judge that has {needed}, got "
                f"{type(judge).__name__}"
            )
        if "{prompt}" not in question:
            raise ValueError(f"the question of a reward must have {{prompt}} where the text belongs, got {question!r}")
        super().__init__(judge, threads)
        self.question, self.probability, self.tries = question, probability, tries

    def list_prompts(self) -> None:
        """Return None: it can be asked about any prompt."""
        return None

    def judge_one(self, prompt: PicturePrompt, picture: Image.Image) -> float:
        """Ask whether the picture shows what the prompt says."""
        question = self.question.replace("{prompt}", prompt.text)
        if self.probability:
            yes: float = self.judge.compute_probability(question, [picture], ["yes", "Yes"])
            return yes
        answer, _ = ask_until_usable(self.judge, Asked([question], [picture], self.tries), read_yes_or_no)
        return float(answer)


class RandomReward:
    """A number between 0 and 1 that has nothing to do with what a picture shows: what chance teaches.

    The same picture of the same prompt always has the same one.

    Args:
        reward: lists the prompts, so that they are those of the reward that chance is compared with.
        seed: decides the numbers.
        levels: 2 gives 0 and 1 alone, as a rule does; None any number.

    Raises:
        ValueError: for fewer than two levels.
    """

    def __init__(self, reward: Any, seed: int = 0, levels: int | None = None) -> None:
        if levels is not None and levels < 2:
            raise ValueError(f"levels of a random reward must be at least 2 or null, got {levels}")
        self.reward, self.seed, self.levels = reward, seed, levels

    def list_prompts(self) -> Sequence[PicturePrompt] | None:
        """List the prompts of the other reward."""
        prompts: Sequence[PicturePrompt] | None = self.reward.list_prompts()
        return prompts

    def score(self, prompts: Sequence[PicturePrompt], pictures: Sequence[Image.Image]) -> list[float]:
        """Draw a number for each picture."""
        scores = []
        for prompt, picture in zip(prompts, pictures, strict=True):
            words = f"{self.seed}/{prompt.text}/".encode() + compute_digest(picture)
            share = int.from_bytes(hashlib.sha256(words).digest()[:7], "big") / 256**7
            scores.append(share if self.levels is None else int(share * self.levels) / (self.levels - 1))
        return scores


def compute_digest(picture: Image.Image) -> bytes:
    """Compute what tells a picture from others."""
    return hashlib.sha256(f"{picture.size}{picture.mode}".encode() + picture.tobytes()).digest()

"""The first token of a reply, as endpoints list it with its probability: which answer it begins, if any."""

import math
from collections.abc import Mapping, Sequence

from tbac.evaluation.judges.base import JudgeError
from tbac.evaluation.judges.thoughts import OPENING

SPACES = str.maketrans("▁ĠĊ", "   ")  # how tokenizers write the space and the end of a line
YES_OR_NO = ("yes", "no")
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "none", "no", "several", "many", "other",
)  # fmt: skip
# With these a sentence begins, so as tokens they aren't the beginning of a longer word: "On" isn't that of "One".
WORDS = {
    "an", "as", "at", "be", "by", "do", "go", "he", "if", "in", "is", "it", "me", "my", "no", "of", "on", "or", "so",
    "the", "to", "up", "us", "we",
}  # fmt: skip
LEAST_ANSWERED = 0.01  # probability of all answers, the wrong ones too, below which a reply doesn't begin with one


def compute_answer_probability(listed: Mapping[str, float], answers: Sequence[str]) -> float:
    """Add up the probabilities of the first tokens that begin one of several answers.

    Args:
        listed: the likeliest first tokens of the reply -> their probabilities.
        answers: the ways to give one answer: to a yes/no question, or with a number, or any other.

    Raises:
        JudgeError: when the reply doesn't begin with an answer at all, right or wrong, or the probabilities are none.
    """
    words = {token: token.translate(SPACES).strip().casefold() for token in listed}
    first = max(listed, key=lambda token: listed[token])
    if OPENING.fullmatch(words[first]):
        raise JudgeError(f"the reply begins with thoughts, {first!r}, so the probability of an answer can't be read")
    wanted = {answer.strip().casefold() for answer in answers}
    rivals = list_rivals(wanted)
    right = sum(listed[token] for token, word in words.items() if begins_answer(word, wanted))
    if not 0 <= right < 1.01:
        raise JudgeError(f"the probabilities of the reply add up to {right}")
    # What a wrong answer to a question of another kind looks like isn't known.
    if rivals:
        every = wanted | rivals
        answered = sum(listed[token] for token, word in words.items() if word.isdecimal() or begins_answer(word, every))
        if answered < LEAST_ANSWERED:
            likeliest = ", ".join(repr(token) for token in sorted(listed, key=listed.__getitem__, reverse=True)[:5])
            raise JudgeError(f"the reply doesn't begin with an answer; its likeliest first tokens are {likeliest}")
    return min(right, 1.0)


def list_rivals(wanted: set[str]) -> set[str]:
    """List other answers to the same question, in lower case; none when its kind isn't known."""
    if wanted <= set(YES_OR_NO):
        return set(YES_OR_NO) - wanted
    if all(word in NUMBERS or word.isdecimal() for word in wanted):
        return set(NUMBERS) - wanted
    return set()


def begins_answer(word: str, answers: set[str]) -> bool:
    """Whether a token is one of the answers, or begins one, as tokenizers cut words; all in lower case.

    A beginning of one letter could be that of any word, except in the answer to a yes/no question.
    """
    if word in answers:
        return True
    least = 1 if answers <= set(YES_OR_NO) else 2
    return len(word) >= least and word not in WORDS and any(answer.startswith(word) for answer in answers)


def read_listed(top_logprobs: Sequence) -> dict[str, float]:
    """Read the tokens that an endpoint lists, with their probabilities; a logarithm above 0 can only be a rounding."""
    listed: dict[str, float] = {}
    for item in top_logprobs:
        listed[item.token] = listed.get(item.token, 0.0) + math.exp(min(item.logprob, 0.0))
    return listed

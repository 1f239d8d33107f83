"""How much of a text was read in a picture: pure functions of texts, as two benchmarks count them."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

WORD_SCORES = ("word recall", "word distance")  # of TIIF-Bench's text, read by optical character recognition
NEAR = 0.3  # greatest normalised edit distance at which TIIF-Bench takes a word as found
QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')
LETTERS = "a-zA-Z0-9àâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ\u4e00-\u9fa5"  # that LongText-Bench compares


def list_quoted_words(prompt: str) -> list[str]:
    """List what a prompt has in double quotes."""
    return [straight or curly for straight, curly in QUOTED.findall(prompt)]


def compute_edit_distance(first: Sequence, second: Sequence) -> int:
    """Compute how many insertions, deletions and replacements turn one sequence into another."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        above, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def compute_normalised_distance(first: str, second: str) -> float:
    """Compute the edit distance of two words as a share of the longer one."""
    return compute_edit_distance(first, second) / max(len(first), len(second), 1)


def compare_words(wanted: Sequence[str], lines: Sequence[str]) -> dict[str, float]:
    """Compare the words that a picture should show with the lines that were read in it, as TIIF-Bench does.

    Args:
        wanted: the words.
        lines: read in the picture; each is split at its spaces.

    Returns:
        `word recall`, the share of the words that were found, each line's word serving once; and `word distance`, the
        least sum of normalised edit distances in pairs, with 1 for each word without a partner, per word.
    """
    wanted = [word.lower() for word in wanted]
    # A picture without text counts as one with an empty word.
    found = [word for line in lines or [""] for word in line.lower().split(" ")]
    distances = np.zeros((len(wanted), len(found)))
    for i, word in enumerate(wanted):
        distances[i] = [compute_normalised_distance(word, other) for other in found]
    free = set(range(len(found)))
    recalled = 0
    for row in distances:
        match = next((index for index in sorted(free) if row[index] <= NEAR), None)
        if match is not None:
            free.discard(match)
            recalled += 1
    matched = distances[linear_sum_assignment(distances)].sum()
    distance = (matched + abs(len(found) - len(wanted))) / max(len(found), len(wanted))
    return dict(zip(WORD_SCORES, (recalled / len(wanted), float(distance)), strict=True))


def split_text(text: str, by_letter: bool = False) -> list[str]:
    """Split a text into what LongText-Bench compares: lower-case words, or for Chinese single letters.

    Signs are left out, not replaced by spaces.
    """
    if by_letter:
        return re.findall(f"[{LETTERS}]", text)
    return re.sub(rf"[^{LETTERS}\s]", "", text).lower().split()


def count_found(wanted: Sequence[str], found: Sequence[str]) -> int:
    """Count how many of the wanted words were found, each as often as it was."""
    return sum((Counter(wanted) & Counter(found)).values())

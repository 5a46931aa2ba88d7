"""Statistics of a study: intervals over puzzles and over seeds, and a paired test of two runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats


@dataclass(frozen=True)
class Interval:
    """The mean exact accuracy (0 to 1) of one or more evaluations, and how certain it is.

    low, high: for one evaluation Wilson's 95% interval over its puzzles; for several, which come
        from several seeds, the smallest and the largest accuracy.
    t_low, t_high: the 95% t interval of the mean over three seeds or more, otherwise NaN.
    runs: the number of evaluations. count: the number of puzzles in the smallest of them.
    """

    mean: float
    low: float
    high: float
    t_low: float
    t_high: float
    runs: int
    count: int

    @property
    def kind(self) -> str:
        """What `low` and `high` are, in words."""
        return "95% Wilson interval" if self.runs == 1 else f"range of {self.runs} seeds"


def accuracy_interval(evaluations: Sequence[Mapping[str, Any]]) -> Interval | None:
    """The Interval of evaluations with exact_accuracy and count; None if there are none."""
    if not evaluations:
        return None
    values = [float(one["exact_accuracy"]) for one in evaluations]
    count = int(min(one["count"] for one in evaluations))
    mean, low, high, t_low, t_high = spread(values)
    if len(values) == 1:
        low, high = wilson(mean, count)
    return Interval(mean, low, high, t_low, t_high, len(values), count)


def wilson(accuracy: float, count: int) -> tuple[float, float]:
    """The 95% interval (Wilson 1927) of an accuracy (0 to 1) over `count` puzzles: (low, high)."""
    test = scipy.stats.binomtest(round(accuracy * count), count)
    interval = test.proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def spread(values: Sequence[float]) -> tuple[float, float, float, float, float]:
    """(mean, smallest, largest, t_low, t_high) of values of several seeds.

    t_low and t_high bound the 95% t interval of the mean. They are NaN for fewer than three seeds:
    of two seeds this interval says nothing.
    """
    array = np.asarray(values, float)
    mean, half = float(array.mean()), np.nan
    if len(array) > 2:
        half = float(scipy.stats.t.ppf(0.975, len(array) - 1) * scipy.stats.sem(array))
    return mean, float(array.min()), float(array.max()), mean - half, mean + half


def mcnemar(solved: np.ndarray, baseline: np.ndarray) -> tuple[int, int, float]:
    """McNemar's exact test of two [N] bool arrays of the same puzzles.

    Returns (puzzles that only `solved` has, puzzles that only `baseline` has, two-sided p).
    """
    gained, lost = int((solved & ~baseline).sum()), int((~solved & baseline).sum())
    if not gained + lost:
        return gained, lost, 1.0
    return gained, lost, float(scipy.stats.binomtest(gained, gained + lost, 0.5).pvalue)

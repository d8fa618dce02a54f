"""`flexq bench linear --fit`: the dispatcher's table of costs, fitted to what this GPU's kernels take.

The estimate of a kernel is piecewise linear in most of its costs (docs/how-it-works/kernels/dispatch.md), so that a
few damped least-squares steps on the logarithms of costs, against the logarithms of measured times, find a table. The
slopes are differences of estimates with one cost changed; each table is asked about in a process of its own.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from flexq.bench.estimates import Question, ask
from flexq.bench.explain import Choice
from flexq.progress import Progress

# Rules for which kernels are candidates, the memory's own share, and the 1-bit kernels' costs: not fitted.
_FIXED = ("bandwidth_share", "mma_only_tokens", "wgmma_only_tokens", "mma_bits_clocks", "mma_bit_product_clocks")
_NUDGE = 1.05
_MOST_STEP = math.log(1.6)
_PROCESSES = 4

Ask = Callable[[str, Sequence[Question]], list[dict[str, float]]]


def parse(table: str) -> dict[str, float]:
    """Names and values of a table's text."""
    lines = (line.partition("#")[0].strip() for line in table.splitlines())
    return {name.strip(): float(value) for name, _, value in (line.partition("=") for line in lines if line)}


def text_of(table: dict[str, float], comment: str = "") -> str:
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + "".join(f"{name} = {value:.6g}\n" for name, value in table.items())


@dataclass
class Fit:
    """A fitted table, and how well it and the one before describe the measurements.

    Args:
        table: names and values.
        error_before, error: mean absolute logarithm of estimate over measurement.
        regret_before, regret: mean share of time that the choices take longer than the fastest kernels.
    """

    table: dict[str, float]
    error_before: float
    error: float
    regret_before: float
    regret: float


class _Measured:
    """Measured times of every kernel of every GEMM, and residuals of a table against them."""

    def __init__(self, choices: Sequence[Choice], asked: Ask):
        self.questions: list[Question] = [(c.n, c.k, c.m, c.act_bits, c.scheme) for c in choices]
        self.times = [{name: us for name, _, us in c.kernels} for c in choices]
        self.asked = asked
        best = [min(times.values()) for times in self.times]
        pairs = [(i, name) for i, times in enumerate(self.times) for name in times]
        self.pairs = pairs
        # What is far from the fastest matters little.
        self.weights = np.array([best[i] / self.times[i][name] for i, name in pairs]) ** 6
        self.logs = np.log([self.times[i][name] for i, name in pairs])

    def estimates(self, table: dict[str, float]) -> list[dict[str, float]]:
        return self.asked(text_of(table), self.questions)

    def residuals(self, estimates: list[dict[str, float]]) -> np.ndarray:
        # The estimate is of the GEMM alone where the measurement is of a layer: a constant share is no error.
        return np.log([max(estimates[i].get(name, 1e9), 1e-3) for i, name in self.pairs]) - self.logs

    def loss(self, residuals: np.ndarray) -> float:
        return float(np.average(residuals**2, weights=self.weights))

    def error(self, residuals: np.ndarray) -> float:
        return float(np.average(np.abs(residuals), weights=self.weights))

    def regret(self, estimates: list[dict[str, float]]) -> float:
        """Mean over GEMMs of how much longer the kernel of least estimate takes than the fastest, as a share."""
        shares = []
        for times, found in zip(self.times, estimates, strict=True):
            chosen = min(times, key=lambda name: found.get(name, math.inf))
            shares.append(times[chosen] / min(times.values()) - 1)
        return sum(shares) / len(shares)


def fit(
    choices: Sequence[Choice], table: str, rounds: int = 4, progress: Progress | None = None, asked: Ask = ask
) -> Fit:
    """Fit a table of costs to measurements.

    Args:
        choices: of `explain_linear`, over shapes and numbers of tokens that matter.
        table: the text to start from.
        rounds: of least squares.
        progress: wraps the loop over rounds.
        asked: gives the estimates of a table's text.

    Raises:
        ValueError: nothing was measured, or the library refuses a table.
    """
    if not choices:
        raise ValueError("a fit needs measurements")
    measured, costs = _Measured(choices, asked), parse(table)
    names = [name for name, value in costs.items() if name not in _FIXED and value > 0]
    estimates = measured.estimates(costs)
    residuals = measured.residuals(estimates)
    before = measured.error(residuals), measured.regret(estimates)
    best, damping = (before, costs), 1e-3
    for _ in progress(range(rounds)) if progress else range(rounds):
        slopes = _slopes(measured, costs, names, residuals)
        for _ in range(4):  # until a step helps
            step = _step(slopes, residuals, measured.weights, damping)
            tried = costs | {name: costs[name] * math.exp(s) for name, s in zip(names, step, strict=True)}
            found = measured.estimates(tried)
            new = measured.residuals(found)
            if measured.loss(new) < measured.loss(residuals):
                costs, residuals, damping = tried, new, damping / 3
                scores = measured.error(new), measured.regret(found)
                if _score(*scores) < _score(*best[0]):
                    best = scores, costs
                break
            damping *= 10
        else:
            break
    (error, regret), costs = best
    return Fit(costs, before[0], error, before[1], regret)


def _score(error: float, regret: float) -> float:
    """What is to be small: above all the regret, which is what users feel."""
    return regret + 0.1 * error


def _slopes(measured: _Measured, costs: dict[str, float], names: list[str], residuals: np.ndarray) -> np.ndarray:
    """d residual / d log cost, a column for each name."""

    def nudged(name: str) -> np.ndarray:
        found = measured.residuals(measured.estimates(costs | {name: costs[name] * _NUDGE}))
        return (found - residuals) / math.log(_NUDGE)

    with ThreadPoolExecutor(_PROCESSES) as pool:
        return np.stack(list(pool.map(nudged, names)), axis=1)


def _step(slopes: np.ndarray, residuals: np.ndarray, weights: np.ndarray, damping: float) -> np.ndarray:
    weighted = slopes * weights[:, None]
    hessian = slopes.T @ weighted
    hessian += damping * np.trace(hessian) / len(hessian) * np.eye(len(hessian))
    step = -np.linalg.solve(hessian, weighted.T @ residuals)
    return np.clip(step, -_MOST_STEP, _MOST_STEP)

"""Second moments of a layer's inputs, and how much of them a text of finite length lets one believe.

Correlations in a short text are partly chance, and codes that make up for each other by them are worse for it on other
texts. So they are shrunk towards none (as Ledoit and Wolf shrink covariances, "A well-conditioned estimator for
large-dimensional covariance matrices", 2004), as far as suits the half of the text that they were not taken from.
"""

import functools

import torch

from flexq import ops
from flexq.quantize.group import Group

SHRINKAGES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
_UNCHECKED = 0.1  # where all of the text is in one half
_PROBES = 64


class Hessian:
    """Sum of w x x^T over a layer's inputs x [..., K] with weights w [...], kept for two halves of the text apart:
    float32 [2, K, K]."""

    def __init__(self, k: int, device: torch.device):
        self.sums = torch.zeros(2, k, k, device=device)
        self.count = 0.0

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None, half: int = 0) -> None:
        """Inputs, each with a weight of 1 or the one given; ValueError if x holds a NaN or Inf."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not torch.isfinite(rows).all():
            raise ValueError("the calibration text gives inputs that are not finite")
        if weights is None:
            self.sums[half].addmm_(rows.T, rows)
            self.count += len(rows)
        else:
            self.sums[half].addmm_((rows * weights.reshape(-1, 1)).T, rows)
            self.count += weights.sum().item()

    def add_up(self, group: Group) -> None:
        """Those of all processes."""
        group.add_up(self.sums)
        self.count = group.total(self.count, self.sums.device)

    def leaning_on(self, other: "Hessian", share: float) -> "Hessian":
        """A share of this one's mean and the rest of another's."""
        blend = Hessian(self.sums.shape[-1], self.sums.device)
        own = share if self.count > 0 else 0.0
        for one, part in ((other, 1 - own), (self, own)):
            if part > 0 and one.count > 0:
                blend.sums += one.sums * (part / one.count)
                blend.count = 1.0
        return blend

    def shrinkage(self, rotation: str, damping: float) -> float:
        """The share of correlations not to believe: of `SHRINKAGES` the one by which each half's correlations, shrunk,
        leave the least error on the other half."""
        halves = [half / half.trace() for half in self.sums if half.trace() > 0]
        if len(halves) < 2:
            return _UNCHECKED
        probes = _probes(padded(self.sums.shape[-1])).to(self.sums.device)
        moments = [_in_basis(half, rotation) for half in halves]
        uncorrelated = [_in_basis(half.diagonal().diag(), rotation) for half in halves]

        def error(share: float) -> float:
            return sum(
                _error_of(moments[i].lerp(uncorrelated[i], share), moments[1 - i], probes, damping) for i in range(2)
            )

        return min(SHRINKAGES, key=error)

    def mean(self, rotation: str, damping: float) -> torch.Tensor:
        """[Kp, Kp], Kp = K padded to whole groups, shrunk, in the basis of the rotation; the identity if nothing was
        seen. `damping` is that of its factors."""
        if self.count == 0:
            return torch.eye(padded(self.sums.shape[-1]), device=self.sums.device)
        mean = self.sums.sum(0) / self.count
        return _in_basis(mean.lerp(mean.diagonal().diag(), self.shrinkage(rotation, damping)), rotation)


def padded(k: int) -> int:
    return ops.num_groups(k) * ops.GROUP_SIZE


def pad(x: torch.Tensor) -> torch.Tensor:
    """Rows [R, K] filled with zeros to whole groups."""
    return torch.nn.functional.pad(x, (0, padded(x.shape[1]) - x.shape[1]))


@functools.lru_cache(maxsize=4)
def _hadamard(device: torch.device) -> torch.Tensor:
    """The rotation of docs/how-it-works/numerics.md as a matrix."""
    h = torch.ones(1, 1, device=device)
    while len(h) < ops.GROUP_SIZE:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / ops.GROUP_SIZE**0.5


def rotate(x: torch.Tensor, rotation: str) -> torch.Tensor:
    """Rows [R, Kp] of whole groups in the basis of the rotation."""
    if rotation == "none":
        return x
    return (x.view(len(x), x.shape[1] // ops.GROUP_SIZE, ops.GROUP_SIZE) @ _hadamard(x.device)).reshape(x.shape)


def _in_basis(moment: torch.Tensor, rotation: str) -> torch.Tensor:
    return rotate(rotate(pad(pad(moment).T), rotation).T, rotation)


def order_of(moment: torch.Tensor) -> torch.Tensor:
    """Columns by falling diagonal: the order in which they are rounded."""
    return torch.argsort(moment.diagonal(), descending=True, stable=True)


def _upper_factor(moment: torch.Tensor, damping: float) -> torch.Tensor | None:
    """Upper R with R R^T = the moment and a share of its mean diagonal on the diagonal, if there is one."""
    flipped = moment.flip(0, 1)
    flipped.diagonal().add_(damping * moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    factor, failed = torch.linalg.cholesky_ex(flipped)
    return None if failed else factor.flip(0, 1)


def inverse_factor(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor of the inverse; damped more, if need be, until there is one."""
    moment = moment.double()
    for _ in range(6):
        upper = _upper_factor(moment, damping)
        if upper is not None:
            identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
            return torch.linalg.solve_triangular(upper, identity, upper=True).float()
        damping *= 10
    raise ValueError("the inputs' correlations cannot be inverted, however damped")


@functools.lru_cache(maxsize=8)
def _probes(k: int) -> torch.Tensor:
    """Signs [Kp, 64], the same on every device."""
    return torch.randint(0, 2, (k, _PROBES), generator=torch.Generator().manual_seed(k)).float() * 2 - 1


def _error_of(moment: torch.Tensor, other: torch.Tensor, probes: torch.Tensor, damping: float) -> float:
    """What rounding by one moment leaves on inputs of another, but for a factor.

    Rounded in turn, a weight's error is U^T e for independent errors e of its codes, U being the inverse's factor with
    a diagonal of 1; its mean square tr(U other U^T) is taken from random signs (Hutchinson's estimate of a trace).
    """
    order = order_of(moment)
    upper = _upper_factor(moment[order][:, order], damping)
    if upper is None:
        return float("inf")
    errors = torch.empty_like(probes)
    errors[order] = torch.linalg.solve_triangular(upper.mT, upper.diagonal().unsqueeze(1) * probes, upper=False)
    return (errors * (other @ errors)).sum().item()

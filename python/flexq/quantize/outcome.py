"""What a model makes of a text, as a distribution: of the next token, or around the hidden states of an encoder.

Sensitivities and plans count KL divergences. A model without next-token logits is given one: its output for each
token is taken as the mean of a normal distribution, as wide in every direction together as the output is long. The KL
divergence of two is then half the squared error relative to the squared output: about 1 - cosine.
"""

from dataclasses import dataclass

import torch
from torch import nn

from flexq.quantize.inputs import arguments, result_of


@dataclass(frozen=True)
class NextTokens:
    """Log probabilities of each next token but the last, float32 [T, V]."""

    values: torch.Tensor

    def __len__(self) -> int:
        return len(self.values)

    def log_likelihood(self, seed: int) -> torch.Tensor:
        """Summed over tokens that are drawn from the distribution itself, a scalar to call `backward` of."""
        log_p = self.values.detach()
        uniform = torch.rand(len(log_p), 1, generator=torch.Generator().manual_seed(seed)).to(log_p.device)
        below = log_p.exp().cumsum(-1) < uniform
        drawn = below.sum(-1, keepdim=True).clamp_(max=log_p.shape[1] - 1)
        return self.values.gather(1, drawn).sum()

    def divergence(self, other: "NextTokens") -> float:
        """The mean KL divergence of another model's distribution from this one, in nats a token."""
        log_p = self.values.to(other.values.device)
        total = nn.functional.kl_div(other.values, log_p, reduction="sum", log_target=True).item()
        return max(total, 0.0) / len(log_p)  # below 0 by rounding alone


@dataclass(frozen=True)
class HiddenStates:
    """Of each token, float32 [T, H]."""

    values: torch.Tensor

    def __len__(self) -> int:
        return len(self.values)

    @property
    def variance(self) -> torch.Tensor:
        """In every direction: the mean squared length of the states, float32 scalar."""
        return self.values.detach().square().sum(-1).mean().clamp_min(torch.finfo(torch.float32).tiny)

    def log_likelihood(self, seed: int) -> torch.Tensor:
        """Summed over states drawn from the distribution itself, up to a constant: a scalar to call `backward` of."""
        noise = torch.randn(self.values.shape, generator=torch.Generator().manual_seed(seed)).to(self.values.device)
        return (self.values * noise).sum() / self.variance.sqrt()

    def divergence(self, other: "HiddenStates") -> float:
        """The mean KL divergence of another model's distribution from this one, in nats a token."""
        error = (other.values - self.values.to(other.values.device)).square().sum(-1).mean()
        return 0.5 * error.item() / self.variance.item()


Outcome = NextTokens | HiddenStates


def outcome(model: nn.Module, ids: torch.Tensor) -> Outcome:
    """Of token ids [1, L]. ValueError for a model that reads no text, or whose output is no tensor."""
    output = model(**arguments(model, ids))
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor) and logits.dim() == 3:
        return NextTokens(logits[0, :-1].float().log_softmax(-1))
    return HiddenStates(result_of(output).float().flatten(0, -2))

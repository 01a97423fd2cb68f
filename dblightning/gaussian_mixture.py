"""Diffusion Blend in closed form: a Gaussian-mixture "base model", quadratic rewards, and everything the paper derives.

The tilted density p_pre · exp(r/α), its score at every noise level, u of Prop. 1 and the Jensen gaps of Lemma 1 are
known exactly here. Tests hold the samplers against them; a notebook can draw them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Quadratic(NamedTuple):
    """r(x) = ½ xᵀ A x + bᵀ x; linear where A is zero."""

    matrix: Tensor  # A, (d, d), symmetric
    vector: Tensor  # b, (d,)

    def __call__(self, x: Tensor) -> Tensor:
        """Rewards (…,) of points (…, d)."""
        return 0.5 * torch.einsum("...i,ij,...j->...", x, self.matrix, x) + x @ self.vector

    def scaled(self, factor: float) -> Quadratic:
        """factor · r: r/α, or a term of a weighted sum."""
        return Quadratic(self.matrix * factor, self.vector * factor)

    @staticmethod
    def linear(vector: Tensor) -> Quadratic:
        """bᵀ x."""
        return Quadratic(torch.zeros(len(vector), len(vector), dtype=vector.dtype), vector)

    @staticmethod
    def weighted(rewards: list[Quadratic], weights: list[float]) -> Quadratic:
        """r(w) = Σ wᵢ rᵢ."""
        parts = [reward.scaled(weight) for reward, weight in zip(rewards, weights, strict=True)]
        return Quadratic(sum(part.matrix for part in parts), sum(part.vector for part in parts))  # type: ignore[arg-type]


class Noised(NamedTuple):
    """How noise and data are mixed: x_t = scale · x₀ + std · ε."""

    scale: float
    std: float

    @staticmethod
    def flow(sigma: float) -> Noised:
        """x_σ = (1−σ) x₀ + σ ε."""
        return Noised(1 - sigma, sigma)

    @staticmethod
    def of(alpha: float | Noised) -> Noised:
        """A mixing, or that of ᾱ: x_t = √ᾱ x₀ + √(1−ᾱ) ε."""
        return alpha if isinstance(alpha, Noised) else Noised(math.sqrt(alpha), math.sqrt(1 - alpha))


class GaussianMixture(NamedTuple):
    """Σ_k w_k N(mean_k, covariance_k) in d dimensions. Leading dimensions hold one mixture per point."""

    log_weights: Tensor  # (…, n), normalised
    means: Tensor  # (…, n, d)
    covariances: Tensor  # (…, n, d, d)

    @staticmethod
    def of(weights: Tensor, means: Tensor, covariances: Tensor) -> GaussianMixture:
        """From positive weights (n,), divided by their sum."""
        return GaussianMixture((weights / weights.sum()).log(), means, covariances)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density (…,) at points (…, d)."""
        return torch.logsumexp(self._joint(x), -1)

    def _joint(self, x: Tensor) -> Tensor:
        """log w_k N(x; k), (…, n)."""
        away = x.unsqueeze(-2) - self.means
        squares = (away * torch.linalg.solve(self.covariances, away.unsqueeze(-1)).squeeze(-1)).sum(-1)
        volume = torch.linalg.slogdet(self.covariances).logabsdet + x.shape[-1] * math.log(2 * math.pi)
        return self.log_weights - 0.5 * (squares + volume)

    def score(self, x: Tensor) -> Tensor:
        """∇ log p, (…, d)."""
        shares = self._joint(x).softmax(-1)
        pulls = torch.linalg.solve(self.covariances, (self.means - x.unsqueeze(-2)).unsqueeze(-1)).squeeze(-1)
        return (shares.unsqueeze(-1) * pulls).sum(-2)

    def noised(self, alpha: float | Noised) -> GaussianMixture:
        """The law of x_t = √ᾱ x₀ + √(1−ᾱ) ε, or of another mixing."""
        scale, std = Noised.of(alpha)
        eye = torch.eye(self.means.shape[-1], dtype=self.means.dtype)
        return self._replace(means=scale * self.means, covariances=scale**2 * self.covariances + std**2 * eye)

    def epsilon(self, x: Tensor, alpha: float | Noised) -> Tensor:
        """The exact noise prediction E[ε | x_t] = −√(1−ᾱ) ∇ log p_t(x_t), (…, d)."""
        return -Noised.of(alpha).std * self.noised(alpha).score(x)

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """The exact velocity E[ε − x₀ | x_σ] on the flow path, (…, d), for σ > 0; at σ = 1 it is x − E[x₀]."""
        away = self.posterior(x, Noised.flow(sigma)).mean()
        return (x - away) / sigma

    def posterior(self, x: Tensor, alpha: float | Noised) -> GaussianMixture:
        """p_{0|t}(· | x_t), one mixture per point (…, d)."""
        noised, scale = self.noised(alpha), Noised.of(alpha).scale
        gain = scale * torch.linalg.solve(noised.covariances, self.covariances).mT
        away = x.unsqueeze(-2) - noised.means
        means = self.means + (gain @ away.unsqueeze(-1)).squeeze(-1)
        covariances = self.covariances - scale * gain @ self.covariances
        return GaussianMixture(noised._joint(x).log_softmax(-1), means, covariances.expand(*means.shape, -1))

    def tilted(self, reward: Quadratic) -> GaussianMixture:
        """p · exp(r) / Z, eq. (6) with r/α for ``reward``.

        Raises:
            ValueError: a reward that grows faster than the density falls, so that Z is infinite.
        """
        mixture, _ = self._tilt(reward)
        return mixture

    def log_expected_exp(self, reward: Quadratic) -> Tensor:
        """log E[exp r], (…,)."""
        return self._tilt(reward)[1]

    def expected(self, reward: Quadratic) -> Tensor:
        """E[r], (…,)."""
        spread = 0.5 * torch.einsum("ij,...ji->...", reward.matrix, self.covariances)
        return (self.log_weights.exp() * (reward(self.means) + spread)).sum(-1)

    def _tilt(self, reward: Quadratic) -> tuple[GaussianMixture, Tensor]:
        precision = torch.linalg.inv(self.covariances)
        sharper = precision - reward.matrix
        if bool((torch.linalg.eigvalsh(sharper) <= 0).any()):
            raise ValueError("the reward grows faster than the density falls, so exp(r) has no mean; take a larger α")
        pull = (precision @ self.means.unsqueeze(-1)).squeeze(-1) + reward.vector
        means = torch.linalg.solve(sharper, pull.unsqueeze(-1)).squeeze(-1)
        before = torch.einsum("...i,...ij,...j->...", self.means, precision, self.means)
        volume = torch.linalg.slogdet(precision).logabsdet - torch.linalg.slogdet(sharper).logabsdet
        gains = self.log_weights + 0.5 * (volume + (pull * means).sum(-1) - before)
        return GaussianMixture(gains.log_softmax(-1), means, torch.linalg.inv(sharper)), torch.logsumexp(gains, -1)

    def mean(self) -> Tensor:
        """(…, d)."""
        return (self.log_weights.exp().unsqueeze(-1) * self.means).sum(-2)

    def covariance(self) -> Tensor:
        """(…, d, d)."""
        away = self.means - self.mean().unsqueeze(-2)
        spread = self.covariances + away.unsqueeze(-1) * away.unsqueeze(-2)
        return (self.log_weights.exp()[..., None, None] * spread).sum(-3)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``count`` points (count, d)."""
        chosen = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[-1], generator=generator, dtype=self.means.dtype)
        roots = torch.linalg.cholesky(self.covariances)
        return self.means[chosen] + (roots[chosen] @ noise.unsqueeze(-1)).squeeze(-1)


def control(mixture: GaussianMixture, reward: Quadratic, x: Tensor, alpha: float | Noised) -> Tensor:
    """u(x, t) of Prop. 1, eq. (7), with r/α for ``reward``: ∇_x log E[exp r(x₀) | x_t = x], (N, d)."""
    return _gradient(lambda point: mixture.posterior(point, alpha).log_expected_exp(reward), x)


def approximate_control(mixture: GaussianMixture, reward: Quadratic, x: Tensor, alpha: float | Noised) -> Tensor:
    """ū(x, t) of eq. (8): ∇_x E[r(x₀) | x_t = x], (N, d)."""
    return _gradient(lambda point: mixture.posterior(point, alpha).expected(reward), x)


def jensen_gap(mixture: GaussianMixture, reward: Quadratic, x: Tensor, alpha: float | Noised) -> Tensor:
    """Δ = u − ū of eq. (8), (N, d)."""
    return control(mixture, reward, x, alpha) - approximate_control(mixture, reward, x, alpha)


def _gradient(function: object, x: Tensor) -> Tensor:
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(point).sum(), point)  # type: ignore[operator]
    return gradient

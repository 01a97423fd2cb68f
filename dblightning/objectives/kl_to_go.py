"""The KL still to come after a step, which the exact gradient of eq. (4) subtracts from the step's advantage."""

from __future__ import annotations

import torch
from torch import Tensor

from dblightning.objectives.policy import AdapterPolicy
from dblightning.replay import Transitions
from dblightning.rollout import Trajectory
from dblightning.schedule import GaussianStep, gaussian_kl


def kl_to_go(kls: Tensor) -> Tensor:
    """Σ_{s>t} KL_s of each step t, (T, B), of the steps' KLs (T, B); zero for the last.

    ∇ E[r − α Σ_s KL_s] = E[Σ_t ∇log p_t · (r − α Σ_{s>t} KL_s)] − α E[Σ_s ∇KL_s]: an action is to blame for what it
    leads later steps to pay. DPOK leaves that term out (Fan et al. 2023, lemma 4.1 holds without it only for small KL).

    >>> kl_to_go(torch.tensor([[1.0], [2.0], [4.0]])).flatten()
    tensor([6., 4., 0.])
    """
    later = kls.flip(0).cumsum(0).flip(0)
    return torch.cat([later[1:], torch.zeros_like(kls[:1])])


@torch.no_grad()
def step_kls(
    policy: AdapterPolicy,
    trajectory: Trajectory,
    prompt_ids: Tensor,
    adapters: Tensor,
    trained: int,
    batch_size: int,
    precision: str,
) -> Tensor:
    """KL(p_θ ‖ p_pre) of each stored step of a rollout, (T, B), nats; zero of the first and of those not trained.

    One reference row per step and image: the first step's KL is in no step's KL to go. In half precision the policy
    runs once more too, in float32, as for the KL term.

    Args:
        policy: that sampled.
        trajectory: with the steps' means.
        prompt_ids: int64 (B,).
        adapters: place of the adapter that sampled each image, int64 (B,).
        trained: steps 1 … this − 1 are computed.
        batch_size: rows at once.
        precision: of ``kl.precision``.
    """
    assert trajectory.means is not None
    float32 = precision == "float32" and not policy.in_float32(trajectory.latents.device)
    found = torch.zeros_like(trajectory.log_probs)
    count = found.shape[1]
    for chunk in torch.arange(count, max(trained, 1) * count).split(batch_size):
        steps, rows = chunk // count, chunk % count
        at = [index.to(found.device) for index in (steps, rows)]
        latents, index = trajectory.latents[at[0], at[1]], steps + trajectory.start
        none = found.new_zeros(len(chunk))
        part = Transitions(
            latents, latents, index, none, none, none, none, prompt_ids[rows], none, adapter=adapters[rows]
        )
        reference = policy.solver.gaussian(policy.reference(part, float32), latents, index)
        own = GaussianStep(trajectory.means[at[0], at[1]], reference.std)
        if float32:
            own = policy.solver.gaussian(policy.output(part, policy.adapter, float32=True), latents, index)
        found[at[0], at[1]] = gaussian_kl(own, reference)
    policy.forget()
    return found

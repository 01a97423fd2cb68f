"""Best of n: the denoising loss on the best images of each prompt's group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dblightning.objectives.base import Metrics, Policy
from dblightning.objectives.forward_process import ForwardProcess, output_error
from dblightning.replay import Transitions
from dblightning.settings import check
from dblightning.training_settings import TrainingSettings


def best_of_groups(prompt_ids: Tensor, rewards: Tensor, keep: int) -> Tensor:
    """Which images are among the ``keep`` of highest reward of their prompt, bool (B,); ties go to the first.

    >>> best_of_groups(torch.tensor([7, 7, 3, 3]), torch.tensor([0.1, 0.5, 0.2, 0.2]), keep=1)
    tensor([False,  True,  True, False])
    >>> best_of_groups(torch.tensor([7, 7]), torch.tensor([float("nan"), -1.0]), keep=2)  # NaN is never kept
    tensor([False,  True])

    Args:
        prompt_ids: int64 (B,).
        rewards: (B,); those that are NaN or infinite are not kept.
        keep: images per prompt, at least 1; a smaller group is kept whole.
    """
    kept = torch.zeros(len(rewards), dtype=torch.bool)
    finite = torch.isfinite(rewards)
    for prompt_id in prompt_ids.unique():
        rows = ((prompt_ids == prompt_id) & finite).nonzero().flatten()
        kept[rows[rewards[rows].sort(descending=True, stable=True).indices[:keep]]] = True
    return kept


@dataclass
class BestOfN(ForwardProcess):
    """Rejection sampling: of each prompt's n images of a rollout the best are kept, and the model is fitted to them.

    The loss is the one of pre-training, on the policy's own best images: x₀ is noised to the steps of the run's
    schedule, and ‖output − target‖² averaged over the latents' dimensions, where the target is the output that would
    recover x₀ (Dong et al. 2023, "RAFT"; best-of-n policies have KL log n − (n − 1)/n nats to their sampler, Beirami et
    al. 2024). It needs no gradient of the reward, no log-probs and no value function, and takes any sampler.

    n is the data's ``samples_per_prompt``. With ``replay.buffer_size`` the best images of earlier rollouts stay and are
    trained on again; it then counts what is kept, in single steps.

    What is fitted is what was sampled: with ``sampling.guidance_scale`` 1 the conditional prediction, which evaluation
    may guide (``sampling.eval_guidance_scale``); above 1 the guided prediction, at twice the rows.

    The KL term (``kl.weight``) is computed at the noised images: eq. (4)'s path KL under the forward process.

    Args:
        keep: images kept of each prompt and rollout.
        noise_draws: noise levels and noises per kept image and pass.
        text_dropout: share of the rows trained without their prompt, so that the unconditional prediction, from which
            guidance starts, learns the same images; with ``sampling.guidance_scale`` above 1 it must be 0.
    """

    keep: int = 1
    noise_draws: int = 4
    text_dropout: float = 0.1

    def check(self, settings: TrainingSettings) -> None:
        super().check(settings)
        scale = settings.sampling.guidance_scale
        check(
            self.text_dropout == 0 or scale <= 1,
            f"objective.text_dropout {self.text_dropout} trains conditional and unconditional predictions apart, and "
            f"sampling.guidance_scale {scale} samples with both; set text_dropout to 0, or guidance_scale to 1",
        )

    def kept(self, prompt_ids: Tensor, rewards: Tensor) -> Tensor:
        return best_of_groups(prompt_ids, rewards, self.keep)

    def loss(self, policy: Policy, transitions: Transitions) -> tuple[Tensor, Metrics]:
        """Mean squared error of the model's output, of noised samples."""
        error = output_error(policy.solver, policy.current(transitions), transitions)
        return error.mean(), {"train/denoising_error": error.mean(), "train/kept_reward": transitions.reward.mean()}

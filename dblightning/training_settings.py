"""Groups of training settings, as YAML and options name them: ``model.sampling.eta``, ``model.kl.weight`` and so on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_type_hints

from dblightning.execution import Execution
from dblightning.rewards.base import RewardMetric
from dblightning.settings import check, check_settings, rules_of
from dblightning.training_rules import conflicts

Baseline = Literal["value", "prompt", "both", "group"]
Deviation = Literal["group", "global"]
KLForm = Literal["exact", "eps_mse"]


@dataclass(frozen=True)
class AdapterSettings:
    """The LoRA adapter in training.

    Args:
        name: its name; null takes the reward's.
        rank, lora_alpha: LoRA settings; paper: rank 4.
        target_modules: name endings of the layers to adapt; null takes the model family's, attention q, k, v, out for
            Stable Diffusion, as in the paper.
        init: folder of a LoRA to start from; "miniature:NAME" is one that ships with the miniature.
    """

    name: str | None = None
    rank: int = 4
    lora_alpha: float | None = None
    target_modules: Sequence[str] | None = None
    init: str | None = None

    def with_targets(self, default: Sequence[str]) -> AdapterSettings:
        """The same with ``default`` for target modules where none are named."""
        return replace(self, target_modules=default) if self.target_modules is None else self


@dataclass(frozen=True)
class BasisAdapter:
    """An adapter of a basis: its reward, and where it differs from the run's settings; null takes the run's.

    Args:
        reward: what it learns from.
        learning_rate, clip_grad_norm: see ``optimisation``.
        kl_weight, kl_target: see ``kl``.
        init: folder of a LoRA to start from, of the rank that all have.
        clip_reward_gradient, clip_adjoint, clip_to_median: of ``objective``, where that is ``RewardGradient``.
    """

    reward: RewardMetric
    learning_rate: float | None = None
    clip_grad_norm: float | None = None
    kl_weight: float | None = None
    kl_target: float | None = None
    init: str | None = None
    clip_reward_gradient: float | None = None
    clip_adjoint: float | None = None
    clip_to_median: float | None = None

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the settings that it has a value of its own for."""
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


#: settings of a :class:`BasisAdapter` that are those of the objective
OF_OBJECTIVE = ("clip_reward_gradient", "clip_adjoint", "clip_to_median")


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling of rollouts, and of the validation's images.

    Args:
        num_inference_steps: denoising steps T (paper's code: 50).
        eta: noise of a step, must be > 0: DDIM's (paper's code: 1), or a flow's, see ``noise``.
        noise: of a flow-matching model's steps, and of these alone: "flow_sde" (Flow-GRPO; η 0.7 in its SD3.5 runs, 0.9
            for FLUX), "dance_sde" (DanceGRPO; η 0.3) or "cps", coefficients-preserving sampling (η 0.8); null is
            "cps" for a flow. The last step never has noise and is never trained on.
        guidance_scale: classifier-free guidance (paper's code: 7.5).
        negative_prompt: of every prompt; null is none.
        eval_steps, eval_guidance_scale: of the validation's and callbacks' images where they are not the rollouts';
            null takes those (flow_grpo: 10 steps in training, 40 in evaluation).
        rollout_batch_size: images sampled at once; null takes the whole batch, "auto" as many as fit into 80 % of the
            GPU's memory, found at the first rollout (the whole batch on a CPU).
        overlap_reward: score a part of the rollout in the background while the next one is sampled; it needs a
            ``rollout_batch_size`` below the batch.
        execution: how rollouts run the adapter; "auto" merges it into the weights where products are float32 and gates
            it otherwise (half precision, autocast, TF32), because the on-policy ratio must be 1.
    """

    num_inference_steps: int = 50
    eta: float = 1.0
    noise: Literal["flow_sde", "dance_sde", "cps"] | None = None
    guidance_scale: float = 7.5
    negative_prompt: str | None = None
    eval_steps: int | None = None
    eval_guidance_scale: float | None = None
    rollout_batch_size: int | Literal["auto"] | None = None
    overlap_reward: bool = False
    execution: Execution = "auto"


@dataclass(frozen=True)
class OptimisationSettings:
    """Updates of the policy.

    Args:
        learning_rate, weight_decay: AdamW's (paper: 1e-5, 0).
        schedule: of the learning rate: "constant" (paper), or "linear" down to zero at the run's last rollout, which
            takes the gradient's noise out of the final adapter.
        policy_steps: optimiser steps per rollout (paper: 5), each on transitions drawn from the buffer.
        epochs: instead, passes through the latest rollout: each trains on every stored transition exactly once, in as
            many optimiser steps as that takes, the last of a pass being smaller. It needs ``buffer_size`` null.
        batch_size: transitions per forward (paper: 2).
        accumulation: forwards per optimiser step (paper: 12).
        clip_grad_norm: largest gradient norm of a step (paper's code: 0.1, on a loss scaled by ``reward_weight``).
        ema: decay of an exponential moving average of the adapter, taken after every step: it is what is evaluated and
            exported; null has none. 0.987 per step is flow_grpo's 0.9 every eight.
        skip_last_steps: leave this many final denoising steps out of training, not of sampling. With "leading" timestep
            spacing the last but one dominates the gradient's variance. A departure from DPOK; the paper's value is 0.
        reward_weight: of the objective in the loss, beside the KL's ``kl.weight``.
    """

    learning_rate: float = 1e-5
    schedule: Literal["constant", "linear"] = "constant"
    weight_decay: float = 0.0
    policy_steps: int = 5
    epochs: int | None = None
    batch_size: int = 2
    accumulation: int = 12
    clip_grad_norm: float = 0.1
    ema: float | None = None
    skip_last_steps: int = 0
    reward_weight: float = 1.0


@dataclass(frozen=True)
class KLSettings:
    """The KL term.

    Args:
        form: "exact" Gaussian KL, or "eps_mse", DPOK's unweighted ‖ε_θ − ε_pre‖²
            (``schedule.mean_sensitivity(...)**2 / 2`` converts).
        weight: of the KL in the loss (paper: α = 0.1). With 0 the base model is not run but for the first micro-batch
            of a rollout, whose KL is logged.
        to_go: subtract from a step's advantage α times the KL of the trajectory's later steps, which DPOK leaves out of
            the gradient of eq. (4): a step is to blame for where it leads. It costs one row of the base model per
            stored step and image, but for the first.
        target: path KL in nats, as logged in ``train/kl``; ``weight`` starts at its value and is steered there by the
            controller of Ziegler et al. 2019. null keeps the weight (paper).
        warmup: rollouts before the KL term sets in.
        share: of the transitions, of which the KL is computed, in (0, 1]: an unbiased estimate of the KL and of its
            gradient at that share of the cost.
        precision: arithmetic of the KL's predictions: "float32", also where the model's is coarser, whose rounding
            would be most of the KL (docs/training.md), or the "model"'s own, which costs one row less.
    """

    form: KLForm = "exact"
    weight: float = 0.1
    to_go: bool = False
    target: float | None = None
    warmup: int = 0
    share: float = 1.0
    precision: Literal["float32", "model"] = "float32"


@dataclass(frozen=True)
class AdvantageSettings:
    """The advantage's baseline, and the value function.

    Args:
        baseline: "value" function, per-"prompt" mean, or "both" (the value function then learns what the prompt's mean
            leaves over); "group": the mean of the prompt's images in the same rollout, of which there must be two or
            more (GRPO).
        normalize: divide by the prompt's reward standard deviation. α then is in those units.
        deviation: which one: "group", the prompt's, or "global", that of all rewards of the rollout.
        clip: largest absolute advantage; null leaves it (GRPO: 5).
        per_reward: normalise the advantage of each part of a ``WeightedReward`` by itself, then sum by weight and
            standardise over the rollout (GDPO); needs baseline "group". ``normalize`` has no say then.
        drop_flat_groups: leave out prompts whose images all have the same reward, which have no advantage; needs
            baseline "group".
        statistics_window: how many of a prompt's latest rewards its mean and deviation are taken over where the rollout
            has fewer than four images of it; with four or more they are of these alone.
        value_learning_rate, value_steps, value_batch_size, value_width: of the value function (paper: 1e-4, 5, 256;
            code: 256). Each value step is an optimiser step.
    """

    baseline: Baseline = "value"
    normalize: bool = False
    deviation: Deviation = "group"
    clip: float | None = None
    drop_flat_groups: bool = False
    per_reward: bool = False
    statistics_window: int = 32
    value_learning_rate: float = 1e-4
    value_steps: int = 5
    value_batch_size: int = 256
    value_width: int = 256


@dataclass(frozen=True)
class ReplaySettings:
    """The replay buffer.

    Args:
        buffer_size: capacity in stored steps (paper: 1000), rounded down to whole trajectories; null keeps the latest
            rollout only.
    """

    buffer_size: int | None = 1000


@dataclass(frozen=True)
class WindowSettings:
    """The window of a rollout: the steps that are stochastic, stored and trained; the others are deterministic.

    Validation samples with every step stochastic, whatever the window. (Flow-GRPO-Fast: random; MixGRPO: sliding, size
    4 of 25, every 25; docs/training.md.)

    Args:
        size: steps of the window; null: every step is stochastic, and all but ``skip_last_steps`` are trained. 0: none
            is, for objectives on noised final samples, whose rollouts may follow the ODE.
        position: of each rollout's window: "fixed" at ``first``, "random" from ``first`` to ``last``, or "sliding": one
            step on every ``every`` rollouts, from ``last`` back to ``first``.
        first, last: earliest and latest index of the window's first step; ``last`` null is the latest there is, so that
            the window ends before the steps of ``skip_last_steps``.
        every: rollouts that a sliding window stays.
        tail_steps: denoiser calls for what follows the window; null takes each step left in the schedule.
    """

    size: int | None = None
    position: Literal["fixed", "random", "sliding"] = "fixed"
    first: int = 0
    last: int | None = None
    every: int = 25
    tail_steps: int | None = None

    def starts(self, steps: int, skipped: int) -> range:
        """Indices at which the window may begin, in a schedule whose last ``skipped`` steps are not trained."""
        if self.size is None:
            return range(1)
        latest = steps - skipped - self.size if self.last is None else self.last
        return range(self.first, latest + 1)


@dataclass(frozen=True)
class TrainingSettings:
    """All groups of a run."""

    adapter: AdapterSettings
    sampling: SamplingSettings
    optimisation: OptimisationSettings
    kl: KLSettings
    advantage: AdvantageSettings
    replay: ReplaySettings
    window: WindowSettings

    @classmethod
    def of(cls, *groups: Any) -> TrainingSettings:
        """The groups in their order, each as itself or as a mapping by name.

        Raises:
            ValueError: names that a group does not have.
        """
        kinds = get_type_hints(cls).values()
        return cls(*(group_of(kind, group) for kind, group in zip(kinds, groups, strict=True)))

    def of_adapter(self, name: str, own: BasisAdapter) -> TrainingSettings:
        """The settings of one adapter of a basis.

        Raises:
            ValueError: its own are out of range.
        """
        numbers = [field.name for field in fields(own) if field.name not in ("reward", "init")]
        check_settings({each: getattr(own, each) for each in numbers}, rules_of("adapters"), f"adapters.{name}")
        kl = {each.removeprefix("kl_"): value for each, value in own.given("kl_weight", "kl_target").items()}
        found = replace(
            self,
            adapter=replace(self.adapter, name=name, init=own.init),
            optimisation=replace(self.optimisation, **own.given("learning_rate", "clip_grad_norm")),
            kl=replace(self.kl, **kl),
        )
        found.check()
        return found

    def check(self) -> None:
        """Refuse settings that are out of range or do not go together.

        Raises:
            ValueError: naming the first such setting, its value, the rule and what to do.
        """
        for group, settings in self.groups():
            check_settings(settings, rules_of(group, settings), group)
        for problem in conflicts(dict(self.groups())):
            raise ValueError(problem)
        steps, skipped = self.sampling.num_inference_steps, self.optimisation.skip_last_steps
        target, weight, size = self.kl.target, self.kl.weight, self.replay.buffer_size
        check(target is None or weight > 0, f"kl.target {target} needs a kl.weight > 0 to start from, got 0")
        check(skipped < steps, f"skip_last_steps must leave a step to train on: got {skipped} of {steps}")
        check(
            size is None or size >= (self.window.size or steps),
            f"buffer_size counts single steps and must hold at least one trajectory of {self.window.size or steps}, "
            f"got {size}",
        )

    def groups(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each group's name and its settings by name, lists for sequences."""
        for field in fields(self):
            values = asdict(getattr(self, field.name))
            yield field.name, {name: list(each) if isinstance(each, tuple) else each for name, each in values.items()}


def group_of(kind: Any, value: Any) -> Any:
    """A group of settings, from one or from a mapping by name.

    Raises:
        ValueError: names that the group does not have.
    """
    if not isinstance(value, Mapping):
        return value
    known = [field.name for field in fields(kind)]
    unknown = [name for name in value if name not in known]
    check(not unknown, f"{kind.__name__} has no setting {unknown[0] if unknown else ''!r}; it has {', '.join(known)}")
    return kind(**value)

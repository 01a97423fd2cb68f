"""RewardRLModule: fine-tune an adapter on a reward by a KL-regularised policy gradient (DPOK)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dblightning.adapters import ATTENTION
from dblightning.backbone import Backbone, Conditioning
from dblightning.batch_size import CudaMeter, largest_batch
from dblightning.blending import Blend, Single
from dblightning.checkpointing import save_last_good_state
from dblightning.distributed import Ranks
from dblightning.lightning_internals import attached_trainer, collective_timeout, logged_step, validate_now
from dblightning.loggers import keep_tables, log_by_prompt
from dblightning.noise import ImageNoise, image_seed
from dblightning.policy_gradient import OBJECTIVES, PromptStatistics, clip_fraction, explained_variance
from dblightning.precision import computes_in_float32, float32_arithmetic
from dblightning.progress import RolloutProgress
from dblightning.replay import ReplayBuffer, Transitions
from dblightning.rewards.base import RewardMetric, RewardUnavailable
from dblightning.rewards.worker import RewardWorker
from dblightning.rollout import Trajectory, rollout
from dblightning.run_folder import RunGuard
from dblightning.run_state import RunState
from dblightning.sampling import Execution, denoise_loop
from dblightning.schedule import GaussianStep, gaussian_kl, gaussian_log_prob, to_epsilon
from dblightning.settings import RULES, Number, check, check_settings
from dblightning.solvers import make_solver
from dblightning.value import ValueFunction

#: rules of the settings below; ``eta`` 0 is a sampler's, not a policy's
TRAINING_RULES = RULES | {
    "eta": Number(above=0, most=1, remedy="a step without noise has no density to train on; the paper's is 1")
}
#: metrics of which the largest value is logged, not the mean
WORST = ("train/on_policy_ratio_error",)


def adapted_kl_weight(kl_weight: float, kl: float, target: float) -> float:
    """The KL weight of the next rollout: up a little if the KL exceeds its target, else down.

    The proportional controller of Ziegler et al. 2019 ("Fine-tuning language models from human preferences", section
    2.2): w ← w (1 + 0.1 e) with e = clip(kl / target − 1, −0.2, 0.2), so at most 2 % per rollout.

    Args:
        kl_weight: the weight so far, > 0.
        kl, target: path KL measured and wanted, nats.
    """
    return kl_weight * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


def _set(optimizer: Any, **options: float) -> None:
    """Give every parameter group these options: a checkpoint's optimizer brings those of the run it is of."""
    for group in optimizer.param_groups:
        group.update(options)


def without_nan(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W), grey in place of those with a NaN or infinite value; and which were finite, bool (B,)."""
    finite = torch.isfinite(images).flatten(1).all(1)
    return images.where(finite.view(-1, 1, 1, 1), 0.5), finite


class RewardRLModule(RunState):
    """DPOK on a LoRA adapter of a frozen diffusion model: rollout → score → replay → value updates → policy updates.

    Each training batch holds the prompts of one rollout (per rank). Maximises eq. (4) of the paper,
    E[r − α Σ_t KL(p_θ(·|x_t) ‖ p_pre(·|x_t))], with α = ``kl_weight / reward_weight`` when ``kl`` is "exact".
    Log-probs and the KL in the loss are both averaged over the latents' dimensions, so α keeps its meaning.

    Args:
        backbone: the frozen denoiser.
        reward: what to maximise.
        eval_rewards: name → further rewards measured in validation, to see reward hacking.
        adapter_name: the adapter's name; None takes the reward's.
        rank, lora_alpha, target_modules: LoRA settings; paper: rank 4 on attention q, k, v, out.
        init_adapter: folder of a LoRA to start from.
        seed: of the run: adapter initialisation, every image's noise, replay order.
        num_inference_steps: denoising steps T (paper's code: 50).
        eta: DDIM noise, must be > 0 (paper's code: 1).
        guidance_scale: classifier-free guidance (paper's code: 7.5).
        negative_prompt: of every prompt; None is none.
        rollout_batch_size: images sampled at once; None takes the whole batch, "auto" as many as fit into 80 % of the
            GPU's memory, found at the first rollout (the whole batch on a CPU).
        overlap_reward: score a part of the rollout in the background while the next one is sampled; it needs a
            ``rollout_batch_size`` below the batch.
        rollout_execution: how rollouts run the adapter; "auto" merges it into the weights where products are
            float32 and gates it otherwise (half precision, autocast, TF32), because the on-policy ratio must be 1.
        objective: "dpok" (hard clamp of the ratio) or "ppo" (minimum of clipped and unclipped).
        clip_range: c of the ratio clip [1−c, 1+c] (paper: 1e-4).
        kl: "exact" Gaussian KL, or "eps_mse", DPOK's unweighted ‖ε_θ − ε_pre‖²
            (``schedule.mean_sensitivity(...)**2 / 2`` converts).
        kl_precision: arithmetic of the KL's predictions: "float32", also where the model's is coarser, whose rounding
            would be most of the KL (docs/training.md), or the "model"'s own, which costs one row less.
        kl_share: share of the transitions of which the KL is computed, in (0, 1]: an unbiased estimate of the KL and of
            its gradient at that share of the cost.
        kl_weight, reward_weight: weights of KL and reward in the loss (paper: α = 0.1). With ``kl_weight`` 0 the base
            model is not run but for the first micro-batch of a rollout, whose KL is logged.
        kl_target: path KL in nats, as logged in ``train/kl``; ``kl_weight`` starts at its value and is steered there by
            the controller of Ziegler et al. 2019. None keeps the weight (paper).
        kl_warmup: rollouts before the KL term sets in.
        advantage: baseline of the advantage: "value" function, per-"prompt" mean, or "both" (the value function then
            learns what the prompt's mean leaves over).
        normalize_advantage: divide by the prompt's reward standard deviation. α then is in those units.
        learning_rate, weight_decay: AdamW of the policy (paper: 1e-5, 0).
        learning_rate_schedule: "constant" (paper), or "linear" down to zero at the run's last rollout, which takes the
            gradient's noise out of the final adapter.
        policy_steps: optimiser steps per rollout (paper: 5).
        policy_batch_size: transitions per forward (paper: 2).
        gradient_accumulation: forwards per optimiser step (paper: 12).
        clip_grad_norm: largest gradient norm of a step (paper's code: 0.1, on a loss scaled by ``reward_weight``).
        skip_last_steps: leave this many final denoising steps out of training, not of sampling. With "leading" timestep
            spacing the last but one dominates the gradient's variance. A departure from DPOK; the paper's value is 0.
        value_learning_rate, value_steps, value_batch_size, value_width: of the value function (paper: 1e-4, 5, 256;
            code: 256). Each value step is an optimiser step.
        buffer_size: replay capacity in single steps (paper: 1000), rounded down to whole trajectories; None keeps the
            latest rollout only.
        statistics_window: how many of a prompt's latest rewards its mean and deviation are taken over where the rollout
            has fewer than four images of it; with four or more they are of these alone.
        validate_first: validate before the first rollout too, so that curves of ``val/…`` start at step 0.

    Raises:
        ValueError: settings out of range, each named.
    """

    def __init__(
        self,
        backbone: Backbone,
        reward: RewardMetric,
        eval_rewards: dict[str, RewardMetric] | None = None,
        adapter_name: str | None = None,
        rank: int = 4,
        lora_alpha: float | None = None,
        target_modules: Sequence[str] = ATTENTION,
        init_adapter: str | None = None,
        seed: int = 0,
        num_inference_steps: int = 50,
        eta: float = 1.0,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        rollout_batch_size: int | Literal["auto"] | None = None,
        overlap_reward: bool = False,
        rollout_execution: Execution = "auto",
        objective: Literal["dpok", "ppo"] = "dpok",
        clip_range: float = 1e-4,
        kl: Literal["exact", "eps_mse"] = "exact",
        kl_precision: Literal["float32", "model"] = "float32",
        kl_share: float = 1.0,
        kl_weight: float = 0.1,
        reward_weight: float = 1.0,
        kl_target: float | None = None,
        kl_warmup: int = 0,
        advantage: Literal["value", "prompt", "both"] = "value",
        normalize_advantage: bool = False,
        learning_rate: float = 1e-5,
        learning_rate_schedule: Literal["constant", "linear"] = "constant",
        weight_decay: float = 0.0,
        policy_steps: int = 5,
        policy_batch_size: int = 2,
        gradient_accumulation: int = 12,
        clip_grad_norm: float = 0.1,
        skip_last_steps: int = 0,
        value_learning_rate: float = 1e-4,
        value_steps: int = 5,
        value_batch_size: int = 256,
        value_width: int = 256,
        buffer_size: int | None = 1000,
        statistics_window: int = 32,
        validate_first: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone", "reward", "eval_rewards"])
        check_settings(self.hparams, TRAINING_RULES)
        check(kl_target is None or kl_weight > 0, f"kl_target {kl_target} needs a kl_weight > 0 to start from, got 0")
        check(
            skip_last_steps < num_inference_steps,
            f"skip_last_steps must leave a step to train on: got {skip_last_steps} of {num_inference_steps}",
        )
        if buffer_size is not None and buffer_size < num_inference_steps:
            raise ValueError(
                f"buffer_size counts single steps and must hold at least one trajectory of {num_inference_steps}, "
                f"got {buffer_size}"
            )
        self.automatic_optimization = False
        self.backbone = backbone
        self.reward = reward
        self.eval_rewards = nn.ModuleDict(eval_rewards or {})
        self.adapter_name: str = adapter_name or reward.name
        self._add_adapter()
        self.solver = make_solver(backbone.scheduler_config, num_inference_steps, eta)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.value_function = ValueFunction(
                backbone.latent_shape, backbone.pooled_dim, num_inference_steps, value_width
            )
        self.statistics = PromptStatistics(statistics_window)
        self.replay: ReplayBuffer | None = None
        self.prompts: dict[int, str] = {}  # prompt_id → text, for the transitions in the replay buffer
        self.kl_weight = float(kl_weight)  # moves where there is a kl_target
        self.ranks = Ranks()
        self.share_rank_states: Callable[[dict[str, Any]], list[dict[str, Any]]] = self.ranks.gather
        self._share = 1.0  # of this rank's gradient: its stored steps by the ranks' mean
        self._evaluated: dict[str, list[Tensor]] = {}
        self._failure: Exception | None = None
        self._worker: RewardWorker | None = None
        self._fitting: int | None = None  # images that fit into memory at once, where that is asked
        self.rollouts_done = 0
        self.images_done = 0
        self.latest_images: tuple[Tensor, list[str], Tensor] | None = None  # of the last rollout, for callbacks

    def _add_adapter(self) -> None:
        bank, hparams = self.backbone.adapters, self.hparams
        if hparams["init_adapter"] is None:
            bank.add(
                self.adapter_name, hparams["rank"], hparams["lora_alpha"], hparams["target_modules"], hparams["seed"]
            )
        else:
            bank.load(self.adapter_name, hparams["init_adapter"], getattr(self.backbone, "pipeline", None))
            hparams.update(bank.settings(self.adapter_name))  # the file's rank, lora_alpha and target_modules
        bank.train_only(self.adapter_name)

    # ── the algorithm ────────────────────────────────────────────────────────────────────────────────────────────────

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One rollout and the updates that follow it."""
        start = time.perf_counter()
        with self.last_good_state():
            trajectory, images, reward, sampled = self._scored_rollout(batch)
            scored = time.perf_counter()
            self.latest_images = (images, list(batch["prompt"]), reward)
            count = len(reward) * self.ranks.size
            self._store(trajectory, batch, reward)
            with self._no_ddp_sync(), self._profile("update"):
                updates = [self.update_value()] if self.uses_value else []
                updates.append(self.update_policy())
        metrics = self._over_ranks({name: value for update in updates for name, value in update.items()})
        done = time.perf_counter()
        metrics["train/kl_weight"] = self.kl_weight
        self._adapt_kl_weight(metrics["train/kl"])
        self.rollouts_done += 1
        self.images_done += count
        self.set_learning_rate()
        self.stop_at_the_last_rollout()
        metrics |= {
            "time/sampling_s": sampled - start,
            "time/reward_s": scored - sampled,
            "time/update_s": done - scored,
            "time/images_per_s": count / (done - start),
            "time/device_s_per_image": (done - start) * self.ranks.size / count,
            "train/images": float(self.images_done),
        }
        if self.device.type == "cuda":
            metrics["memory/peak_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self.log_dict(metrics, batch_size=len(reward))
        self.log("kl", metrics["train/kl"], prog_bar=True, logger=False, batch_size=len(reward))

    def _scored_rollout(self, batch: dict[str, Any]) -> tuple[Trajectory, Tensor, Tensor, float]:
        """Trajectory, images, rewards (B,), and when sampling ended (``time.perf_counter``)."""
        with (
            self.ranks.together("a rollout or its reward"),
            self._until_all_know() as given_up,
            self._reward_worker() as worker,
        ):
            parts: list[Future] = []
            with self._profile("rollout"), self._no_ddp_sync(), torch.no_grad():
                trajectory, images = self.roll_out(
                    batch, None if worker is None else lambda *part: parts.append(worker.submit(*part))
                )
                if self.device.type == "cuda":
                    # decoding is still in progress there; of this stream alone, as a worker scores on its own
                    torch.cuda.current_stream(self.device).synchronize()
            sampled = time.perf_counter()
            with self._profile("reward"):
                waited = [part.result() for part in parts]
                reward = torch.cat(waited) if parts else self.reward.score(images, batch["prompt"]).detach()
                reward = reward.where(torch.isfinite(trajectory.log_probs).all(0).to(reward.device), torch.nan)
        self._stop_if_unavailable(given_up)
        return trajectory, images, reward, sampled

    @contextmanager
    def _until_all_know(self) -> Iterator[list[str]]:
        """Keeps the error of a reward that is unavailable, to be raised once no rank waits for this one."""
        given_up: list[str] = []
        try:
            yield given_up
        except Exception as error:
            if (found := RewardUnavailable.behind(error)) is None:
                raise
            given_up.append(str(found))

    def _stop_if_unavailable(self, given_up: list[str]) -> None:
        """Raise on every rank what a reward said that is unavailable on one. A collective call."""
        if texts := [text for each in self.ranks.gather(given_up) for text in each]:
            raise RewardUnavailable(texts[0])

    @contextmanager
    def _reward_worker(self) -> Iterator[RewardWorker | None]:
        """The run's one worker where ``overlap_reward`` asks for it; an error ends it."""
        if self.hparams["overlap_reward"] and self._worker is None:
            self._worker = RewardWorker(self.reward)
        try:
            yield self._worker
        except BaseException:
            self._close_worker(cancel=True)
            raise

    def _close_worker(self, cancel: bool = False) -> None:
        if self._worker is not None:
            self._worker.close(cancel)
            self._worker = None

    def _profile(self, name: str) -> AbstractContextManager[None]:
        profiler: Any = self.trainer.profiler  # type: ignore[attr-defined]  # set by Lightning's connector
        context: AbstractContextManager[None] = profiler.profile(name)
        return context

    def roll_out(
        self, batch: dict[str, Any], take: Callable[[Tensor, list[str]], None] | None = None
    ) -> tuple[Trajectory, Tensor]:
        """Sample the batch's images with the adapter as it is: trajectory and images (B, 3, H, W).

        A sample with a NaN or infinite value is a grey image, and its log-probs are NaN.

        Args:
            batch: prompts, their ids and the images' seeds.
            take: is given each part's images and prompts as soon as they are there.
        """
        prompts: list[str] = list(batch["prompt"])
        size = self._images_at_once(prompts)
        parts, images = [], []
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            noise = self._noise(batch["prompt_id"][part], batch["seed"][part], "training")
            parts.append(
                rollout(
                    self.backbone,
                    self.backbone.encode(prompts[part], self.hparams["negative_prompt"]),
                    self.solver,
                    Single(self.adapter_name),
                    noise,
                    self.hparams["guidance_scale"],
                    self._rollout_execution(),
                )
            )
            decoded, finite = without_nan(self.backbone.decode(parts[-1].latents[-1]))
            finite &= torch.isfinite(parts[-1].latents).transpose(0, 1).flatten(1).all(1)
            # a sample that is not finite has no density either, which is how `training_step` knows it
            parts[-1] = parts[-1]._replace(log_probs=parts[-1].log_probs.where(finite, torch.nan))
            images.append(decoded)
            if take is not None:
                take(images[-1], prompts[part])
        whole = Trajectory(*(torch.cat([part[field] for part in parts], dim=1) for field in range(2)))
        return whole, torch.cat(images)

    def _images_at_once(self, prompts: list[str]) -> int:
        """``rollout_batch_size`` in images."""
        size = self.hparams["rollout_batch_size"]
        if size != "auto":
            return int(size or len(prompts))
        if self._fitting is None:
            if self.device.type != "cuda":
                return len(prompts)
            self._fitting = largest_batch(
                lambda count: self._try(prompts[:count]), len(prompts), CudaMeter(self.device)
            )
            rank_zero_info(f"rollout_batch_size: {self._fitting} images fit at once")
        return self._fitting

    def _try(self, prompts: list[str]) -> None:
        """What a rollout of so many images needs most memory for: one denoiser call, and decoding."""
        latents = torch.zeros(len(prompts), *self.backbone.latent_shape, device=self.device)
        timesteps = self.solver.timesteps[:1].to(self.device).expand(len(prompts))
        gates = torch.ones(len(prompts), len(self.backbone.adapters.names), device=self.device)
        conditioning = self.backbone.encode(prompts, self.hparams["negative_prompt"])
        self.backbone.denoise(latents, timesteps, conditioning, self.hparams["guidance_scale"], gates=gates)
        self.backbone.decode(latents)

    def update_value(self) -> dict[str, Tensor]:
        """Fit the value function to the rewards in the buffer: ``value_steps`` optimiser steps on the squared error."""
        optimizer = self._optimizers()[1]
        _set(optimizer, lr=self.hparams["value_learning_rate"])
        batches = self._batches(self.hparams["value_batch_size"], "value")
        losses, explained = [], []
        for _ in range(self.hparams["value_steps"]):
            with self.ranks.together("the value update"):
                for transitions in islice(batches, 1):
                    with torch.autocast(self.device.type, enabled=False):
                        predicted = self._value(transitions)
                        target = self._target(transitions)
                        loss = nn.functional.mse_loss(predicted, target)
                    self.manual_backward(loss)
                    losses.append(loss.detach())
                    explained.append(explained_variance(predicted.detach(), target))
                if not losses:
                    self._backward_of_nothing(self.value_function.parameters())
            self._step(optimizer, self.value_function.parameters())
        if not losses:
            return {}
        return {"train/value_loss": torch.stack(losses).mean(), "train/explained_variance": explained[0]}

    def update_policy(self) -> dict[str, Tensor]:
        """``policy_steps`` optimiser steps on the clipped surrogate minus the KL penalty."""
        optimizer = self._optimizers()[0]
        hparams = self.hparams
        _set(optimizer, lr=self.learning_rate, weight_decay=hparams["weight_decay"])
        batches = self._batches(hparams["policy_batch_size"], "policy")
        logged: dict[str, list[Tensor]] = {}
        accumulated = int(hparams["gradient_accumulation"])
        for policy_step in range(hparams["policy_steps"]):
            with self.ranks.together("the policy update"):
                for index, transitions in enumerate(islice(batches, accumulated)):
                    # autocast keeps casts of weights for the whole step: those made without gradients, or before an
                    # optimiser step, must not be used again
                    torch.clear_autocast_cache()
                    # without a weight the KL is watched, not paid for
                    measured = policy_step == index == 0 or self._kl_weight_now > 0
                    rows = self._kl_rows(len(transitions.reward), policy_step * accumulated + index)
                    loss, metrics = self.policy_loss(transitions, measured, rows)
                    self.manual_backward(loss / accumulated)
                    if policy_step > 0:
                        metrics.pop("train/on_policy_ratio_error")
                    for name, value in metrics.items():
                        logged.setdefault(name, []).append(value.detach())
                if not logged.keys() - {"train/grad_norm"}:
                    self._backward_of_nothing(self.backbone.adapters.parameters(self.adapter_name))
            norm = self._step(optimizer, self.backbone.adapters.parameters(self.adapter_name))
            if norm is not None:
                logged.setdefault("train/grad_norm", []).append(norm)
        worst = {name: torch.stack(logged.pop(name)).max() for name in WORST if name in logged}
        return {name: torch.stack(values).mean() for name, values in logged.items()} | worst

    def policy_loss(
        self, transitions: Transitions, with_kl: bool = True, kl_rows: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of some transitions, and what to log about them.

        −reward_weight · A · clipped ratio + kl_weight · KL, averaged over the transitions.

        Args:
            transitions: (B, …).
            with_kl: False leaves the KL term out and does not run the base model.
            kl_rows: the transitions of which the KL is computed, int64 (n,) on the CPU: ``kl_share`` of them on average
                over the calls. None: all.
        """
        hparams = self.hparams
        with_kl = with_kl and (kl_rows is None or len(kl_rows) > 0)
        watched = transitions if kl_rows is None else transitions.at(kl_rows)
        # before the adapter's forward, whose activations wait for the backward pass
        own_output, reference_output = self._kl_outputs(watched) if with_kl else (None, None)
        output = self._output(transitions)
        step = self.solver.gaussian(output, transitions.latents, transitions.step_index)
        log_prob = gaussian_log_prob(step, transitions.next_latents)
        ratio = (log_prob - transitions.log_prob).exp()
        advantage = self._advantage(transitions)
        surrogate = OBJECTIVES[hparams["objective"]](advantage, ratio, hparams["clip_range"])
        loss = -hparams["reward_weight"] * surrogate.mean()
        metrics = {}
        if reference_output is not None:
            if kl_rows is not None or own_output is not None:
                output = output if kl_rows is None else output[kl_rows.to(output.device)]
                if own_output is not None:
                    # the float32 value with the gradient of the forward at hand: what rounding spoils is the difference
                    # of two predictions, to which the KL's gradient is proportional, not a prediction's own derivative
                    output = own_output + (output - output.detach())
                step = self.solver.gaussian(output, watched.latents, watched.step_index)
            exact_kl, penalty = self._kl(step, output, reference_output, watched)
            share = 1.0 if kl_rows is None else len(kl_rows) / (hparams["kl_share"] * len(transitions.reward))
            loss = loss + self._kl_weight_now * share * penalty.mean()
            # the sum over a path's trained steps, in nats: what eq. (4) multiplies by α
            metrics["train/kl"] = exact_kl.mean() * self.trained_steps
        fresh = transitions.age == 0
        return loss, metrics | {
            "train/policy_loss": loss,
            "train/ratio": ratio.mean(),
            "train/clip_fraction": clip_fraction(ratio, hparams["clip_range"]),
            "train/advantage_std": advantage.std(correction=0),
            "train/on_policy_ratio_error": torch.where(fresh, (ratio - 1).abs(), 0).max(),
        }

    def _kl_rows(self, count: int, visit: int) -> Tensor | None:
        """Which of a micro-batch's ``count`` transitions the KL is computed of, int64 (n,); None: all.

        n is ``kl_share`` of them, carried over from micro-batch to micro-batch where that is not a whole number.
        """
        wanted = float(self.hparams["kl_share"]) * count
        if wanted >= count:
            return None
        # 1e-9: 0.1 · 30 is a little more than 3
        before, after = (math.ceil(visits * wanted - 1e-9) for visits in (visit, visit + 1))
        seed = image_seed(self.hparams["seed"], self.rollouts_done, visit, f"kl rows {self.ranks.rank}")
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: after - before]

    @torch.no_grad()
    def _kl_outputs(self, transitions: Transitions) -> tuple[Tensor | None, Tensor]:
        """What the KL compares: the adapter's output, None where the gradient's own will do, and the base model's."""
        if self.hparams["kl_precision"] == "model" or computes_in_float32(self.backbone, self.device):
            return None, self._reference(transitions)
        return self._output(transitions, float32=True), self._reference(transitions, float32=True)

    def _kl(
        self, step: GaussianStep, output: Tensor, reference_output: Tensor, transitions: Transitions
    ) -> tuple[Tensor, Tensor]:
        """Exact KL to the base model's step in nats, and the penalty that ``kl`` names, both per transition (B,)."""
        reference = self.solver.gaussian(reference_output, transitions.latents, transitions.step_index)
        exact = gaussian_kl(step, reference)
        if self.hparams["kl"] == "exact":
            return exact, exact / transitions.latents[0].numel()  # the log-prob is a mean over dimensions too
        epsilon, reference_epsilon = (self._epsilon(each, transitions) for each in (output, reference_output))
        return exact, (epsilon - reference_epsilon).square().flatten(1).mean(1)

    @property
    def _kl_weight_now(self) -> float:
        """The KL weight in this rollout's loss."""
        return self.kl_weight if self.rollouts_done >= self.hparams["kl_warmup"] else 0.0

    @torch.no_grad()
    def generate(self, prompts: list[str], prompt_ids: Tensor, seeds: Tensor, blend: Blend | None = None) -> Tensor:
        """Images (B, 3, H, W) of prompts with this run's sampling settings; ``blend`` None is the adapter in training.

        The image of (prompt_id, seed) has the same noise whatever the blend, and never a training rollout's.
        """
        latents = denoise_loop(
            self.backbone,
            self.backbone.encode(prompts, self.hparams["negative_prompt"]),
            self.solver,
            blend or Single(self.adapter_name),
            self._noise(prompt_ids, seeds, "evaluation"),
            guidance_scale=self.hparams["guidance_scale"],
        )
        return self.backbone.decode(latents)

    # ── validation ───────────────────────────────────────────────────────────────────────────────────────────────────

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":
            self._stop.listen()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        # Ranks may get different numbers of batches, so they exchange scores and errors once, at the end
        if self._failure is not None:
            return
        try:
            images, finite = without_nan(self.generate(batch["prompt"], batch["prompt_id"], batch["seed"]))
            for name, reward in [("reward", self.reward), *self.eval_rewards.items()]:
                scores = reward.score(images, batch["prompt"])  # type: ignore[operator]
                scores = scores.where(finite.to(scores.device), torch.nan)
                self._evaluated.setdefault(f"{stage}/{name}", []).append(scores.detach().double().cpu())
        except Exception as error:
            self._failure = error
        self._stop.check("no value is written; run the same command again")

    def on_validation_epoch_end(self) -> None:
        self._stop.release()
        try:
            self._log_evaluation()
        except RewardUnavailable as error:
            if not self.trainer.training and not self.trainer.validating:
                raise
            saved = save_last_good_state(self.trainer, self, "before_unavailable_reward.ckpt")
            raise RewardUnavailable(
                f"validation after rollout {self.rollouts_done}: {error} The run is {saved}"
            ) from error

    def on_test_epoch_end(self) -> None:
        self._log_evaluation()

    def _check_evaluation_shares(self) -> None:
        """A rank without a batch would skip the evaluation, and the exchange at its end, while others wait for it."""
        trainer: Any = self.trainer
        if self.ranks.size == 1 or trainer.datamodule is None or trainer.limit_val_batches == 0:
            return
        batches = self.ranks.gather(len(trainer.datamodule.val_dataloader()))
        check(
            min(batches) > 0 or max(batches) == 0,
            f"the validation has fewer images than there are processes: their numbers of batches are {batches}; raise "
            "limit_val_prompts or eval_seeds, or leave it out with --trainer.limit_val_batches 0",
        )

    def _log_evaluation(self) -> None:
        """Mean of each reward over all images of all ranks, but those that are NaN or infinite, which are counted."""
        failure, evaluated = self._failure, self._evaluated
        self._failure, self._evaluated = None, {}
        with self.ranks.together("the evaluation"), self._until_all_know() as given_up:
            if failure is not None:
                raise failure
        self._stop_if_unavailable(given_up)
        own = {name: torch.cat(parts) for name, parts in evaluated.items()}
        finite = {name: scores[torch.isfinite(scores)] for name, scores in own.items()}
        gathered = self.ranks.gather(
            {name: (float(kept.sum()), len(kept), len(own[name]) - len(kept)) for name, kept in finite.items()}
        )
        for name in dict.fromkeys(name for each in gathered for name in each):
            total, count, dropped = map(sum, zip(*(each[name] for each in gathered if name in each), strict=True))
            self.log(name, total / count if count else float("nan"), prog_bar=name.endswith("/reward"))
            if dropped:
                self.log(f"{name}_dropped", float(dropped))

    # ── pieces ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def uses_value(self) -> bool:
        return self.hparams["advantage"] != "prompt"

    @property
    def learning_rate(self) -> float:
        """The policy's learning rate of this rollout."""
        rate = float(self.hparams["learning_rate"])
        if self.hparams["learning_rate_schedule"] == "constant":
            return rate
        total = self.total_rollouts
        check(total is not None, "a linear learning rate needs --trainer.max_epochs or max_steps to know its end")
        return rate * max(0.0, 1 - self.rollouts_done / int(total or 1))

    def set_learning_rate(self) -> None:
        """Give the policy's optimiser the rate of the coming rollout, before callbacks log it."""
        _set(self._optimizers()[0], lr=self.learning_rate)

    @property
    def trained_steps(self) -> int:
        """Steps 0 … this − 1 are trained on."""
        return len(self.solver.timesteps) - int(self.hparams["skip_last_steps"])

    def _noise(self, prompt_ids: Tensor, seeds: Tensor, stream: str) -> ImageNoise:
        return ImageNoise.of(self.hparams["seed"], prompt_ids.tolist(), seeds.tolist(), self.device, stream)

    def _rollout_execution(self) -> Execution:
        chosen: Execution = self.hparams["rollout_execution"]
        if chosen != "auto":
            return chosen
        # rounded to TF32, W + ΔW is another matrix than W and ΔW apart, which the update multiplies by
        return "merged" if computes_in_float32(self.backbone, self.device) else "gated"

    def _store(self, trajectory: Trajectory, batch: dict[str, Any], reward: Tensor) -> None:
        """Put the samples with a finite reward into the buffer; statistics and logs are of all ranks' samples."""
        finite = torch.isfinite(reward)
        rows = finite.cpu().nonzero().flatten()
        own = (batch["prompt_id"].cpu(), list(batch["prompt"]), reward.cpu())
        everyones = self.ranks.gather(own)
        prompt_ids = torch.cat([ids for ids, _, _ in everyones])
        rewards = torch.cat([values for _, _, values in everyones])
        self._stop_if_none(int(torch.isfinite(rewards).sum()))
        for ids, prompts, _ in everyones:
            self.prompts.update(zip(ids.tolist(), prompts, strict=True))
        kept = torch.isfinite(rewards)
        self.statistics.update(prompt_ids[kept], rewards[kept])
        baseline, scale = self.statistics(own[0][rows]) if len(rows) else (reward[:0], reward[:0])
        buffer = self._buffer(len(reward))
        if self.hparams["buffer_size"] is None:
            buffer.clear()
        walk = Trajectory(trajectory.latents[:, finite], trajectory.log_probs[:, finite])
        scores = reward[finite]
        buffer.add(walk, own[0][rows], scores, baseline.to(scores), scale.to(scores), rows)
        held = self.ranks.gather((buffer.size, buffer.prompt_ids[: buffer.size].unique().tolist()))
        self._share = buffer.size * len(held) / sum(size for size, _ in held)
        needed = {*prompt_ids.tolist(), *(prompt_id for _, stored in held for prompt_id in stored)}
        self.prompts = {prompt_id: self.prompts[prompt_id] for prompt_id in self.prompts if prompt_id in needed}
        self._log_rewards(prompt_ids, rewards)

    def _log_rewards(self, prompt_ids: Tensor, rewards: Tensor) -> None:
        finite = torch.isfinite(rewards)
        scores, size = rewards[finite], len(rewards)
        self.log("train/dropped_samples", float(size - len(scores)), reduce_fx="sum", batch_size=size)
        self.log("reward", scores.mean(), prog_bar=True, logger=False, batch_size=size)
        self.log_dict({"train/reward": scores.mean(), "train/reward_std": scores.std(correction=0)}, batch_size=size)
        by_prompt = {
            self.prompts[prompt_id]: scores[prompt_ids[finite] == prompt_id].mean().item()
            for prompt_id in prompt_ids[finite].unique().tolist()
        }
        # to the loggers themselves: Lightning would log a prompt's value again in every later rollout of the epoch
        log_by_prompt(self.trainer, by_prompt, logged_step(self.trainer))

    def _stop_if_none(self, kept: int) -> None:
        """Every rank stops, with a checkpoint saved, when no rank has a finite reward."""
        if kept > 0:
            return
        saved = save_last_good_state(self.trainer, self, "before_nan_rewards.ckpt")
        raise RuntimeError(
            f"every reward of rollout {self.rollouts_done + 1} is NaN or infinite ({self.reward.name}); "
            f"the state before it is {saved}. Check the images and the reward on them"
        )

    def _over_ranks(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Each metric's mean over the stored steps of all ranks, or its largest value if it is one of ``WORST``."""
        values = torch.stack([value.double() for value in metrics.values()]).tolist() if metrics else []
        return self.ranks.mean(dict(zip(metrics, values, strict=True)), self._share, WORST)

    def _adapt_kl_weight(self, kl: float) -> None:
        target = self.hparams["kl_target"]
        # a step that a float16 loss scaler skipped may have measured no KL
        if target is not None and math.isfinite(kl) and self.rollouts_done >= self.hparams["kl_warmup"]:
            self.kl_weight = adapted_kl_weight(self.kl_weight, kl, target)

    def _buffer(self, batch_size: int) -> ReplayBuffer:
        """The replay buffer, allocated at the first rollout."""
        steps, size = len(self.solver.timesteps), self.hparams["buffer_size"]
        capacity = batch_size if size is None else size // steps
        if capacity < batch_size:
            raise ValueError(
                f"a rollout has {batch_size} trajectories of {steps} steps, more than buffer_size {size} holds; "
                f"set buffer_size to at least {batch_size * steps}, or null to keep the latest rollout only"
            )
        if self.replay is None or (size is None and self.replay.capacity != capacity):
            self.replay = ReplayBuffer(capacity, steps, self.backbone.latent_shape, self.device)
        return self.replay

    def _batches(self, count: int, use: str) -> Iterator[Transitions]:
        """Endless batches of ``count`` stored steps; none on a rank that holds no sample with a finite reward."""
        if self.replay is None:
            return

        def seed(lane: int, visit: int) -> int:
            return image_seed(self.hparams["seed"], self.rollouts_done, lane, f"{use} order {visit}")

        for slots, steps in self.replay.batches(count, seed, self.trained_steps, self.ranks.rank):
            yield self.replay.transitions(slots, steps, self.device)

    def _output(self, transitions: Transitions, float32: bool = False) -> Tensor:
        """The model's output with the adapter, with gradients; ``float32`` as in :meth:`_denoise`."""
        names = self.backbone.adapters.names
        gates = torch.zeros(len(transitions.latents), len(names), device=self.device)
        gates[:, names.index(self.adapter_name)] = 1
        return self._denoise(transitions, gates, float32)

    @torch.no_grad()
    def _reference(self, transitions: Transitions, float32: bool = False) -> Tensor:
        """The base model's output: the same network with its gates at zero."""
        return self._denoise(transitions, None, float32)

    def _denoise(self, transitions: Transitions, gates: Tensor | None, float32: bool) -> Tensor:
        """The model's output under these gates; ``float32``: whatever the weights' precision, in float32 arithmetic."""
        latents, timesteps, conditioning, guidance_scale = self._arguments(transitions)
        if not float32:
            return self.backbone.denoise(latents, timesteps, conditioning, guidance_scale, gates=gates)
        conditioning = conditioning.to(torch.float32)
        with float32_arithmetic(self.device):
            return self.backbone.denoise(latents, timesteps, conditioning, guidance_scale, gates=gates)

    def _arguments(self, transitions: Transitions) -> tuple[Tensor, Tensor, Conditioning, float]:
        prompts = [self.prompts[prompt_id] for prompt_id in transitions.prompt_id.tolist()]
        conditioning = self.backbone.encode(prompts, self.hparams["negative_prompt"])
        timesteps = self.solver.timesteps[transitions.step_index].to(self.device, non_blocking=True)
        return transitions.latents, timesteps, conditioning, self.hparams["guidance_scale"]

    def _epsilon(self, output: Tensor, transitions: Transitions) -> Tensor:
        schedule = self.solver.schedule
        alpha, _ = schedule.at(transitions.step_index, transitions.latents)
        return to_epsilon(output, transitions.latents, alpha, schedule.prediction_type)

    def _value(self, transitions: Transitions) -> Tensor:
        prompts = [self.prompts[prompt_id] for prompt_id in transitions.prompt_id.tolist()]
        text = self.backbone.encode(prompts, self.hparams["negative_prompt"]).pooled
        step_index = transitions.step_index.to(self.device, non_blocking=True)
        return self.value_function(transitions.latents, text.float(), step_index)

    def _target(self, transitions: Transitions) -> Tensor:
        """What the value function learns: the reward, less the prompt's mean where that is a baseline too."""
        if self.hparams["advantage"] == "both":
            return transitions.reward - transitions.baseline
        return transitions.reward

    @torch.no_grad()
    def _advantage(self, transitions: Transitions) -> Tensor:
        if self.hparams["advantage"] == "prompt":
            advantage = transitions.reward - transitions.baseline
        else:
            with torch.autocast(self.device.type, enabled=False):
                advantage = self._target(transitions) - self._value(transitions)
        if self.hparams["normalize_advantage"]:
            # 1e-3: a prompt whose images all score alike has no signal, and must not be blown up
            advantage = advantage / transitions.scale.clamp_min(1e-3)
        return advantage

    # ── optimisation ─────────────────────────────────────────────────────────────────────────────────────────────────

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        hparams = self.hparams
        policy = self.backbone.adapters.parameters(self.adapter_name)
        return [
            torch.optim.AdamW(policy, lr=hparams["learning_rate"], weight_decay=hparams["weight_decay"]),
            torch.optim.AdamW(self.value_function.parameters(), lr=hparams["value_learning_rate"]),
        ]

    def _optimizers(self) -> list[Any]:
        optimizers: Any = self.optimizers()
        return optimizers

    def _step(self, optimizer: Any, parameters: Any) -> Tensor | None:
        """Average the gradients over ranks, once; then clip, step, reset.

        Returns:
            The norm before clipping; None where a float16 loss scaler skipped the step.

        Raises:
            NonFiniteError: the gradients are NaN or infinite; on every rank, before the step.
        """
        self.ranks.average_gradients(list(parameters), self._share)
        optimizer.step()
        optimizer.zero_grad()
        return self._norm

    def _backward_of_nothing(self, parameters: Iterable[Tensor]) -> None:
        """Gradients of zero, by the way all gradients come: a rank without samples keeps its loss scale in step."""
        self.manual_backward(torch.stack([parameter.sum() for parameter in parameters]).sum() * 0)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # here, where a float16 loss scale is already taken out of the gradients
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        policy = parameters[0] is self.backbone.adapters.parameters(self.adapter_name)[0]
        limit = self.hparams["clip_grad_norm"] if policy else float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        self._norm = norm if self.gradients_are_finite(norm, parameters, "policy" if policy else "value") else None

    def _check_precision(self) -> None:
        """Refuse precisions in which the adapter cannot learn."""
        precision, dtype = str(self.trainer.precision), next(self.backbone.parameters()).dtype
        check(
            precision not in ("bf16-true", "16-true"),
            f"precision {precision} would round the adapter and its optimizer to half precision, where small steps are "
            "lost; give the backbone a half-precision dtype (bfloat16), which keeps them in float32, and take "
            "--trainer.precision 32-true",
        )
        check(
            dtype != torch.float16 or precision == "16-mixed",
            f"a float16 backbone needs a scaled loss, or most of its gradient underflows, got precision {precision}; "
            "take --trainer.precision 16-mixed (on a GPU), or dtype bfloat16 and 32-true",
        )

    def _no_ddp_sync(self) -> AbstractContextManager[None]:
        """DDP's own gradient exchange is off: :meth:`_step` exchanges once per optimiser step."""
        model = self.trainer.strategy.model if attached_trainer(self) is not None else None
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def configure_callbacks(self) -> list[L.Callback]:
        """What every training run has, where the trainer was given none of it."""
        given = self.trainer.callbacks  # type: ignore[attr-defined]
        keep_tables(self.trainer)
        own = (RunGuard, RolloutProgress)
        return [kind() for kind in own if not any(isinstance(each, kind) for each in given)]

    def on_train_start(self) -> None:
        super().on_train_start()
        self.set_learning_rate()
        if self.hparams["validate_first"] and self.rollouts_done == 0:
            validate_now(self.trainer)

    def on_fit_end(self) -> None:
        self._close_worker()

    def setup(self, stage: str) -> None:
        self.ranks.timeout = collective_timeout(self.trainer.strategy)
        if stage == "fit":
            self._check_precision()
        self._check_evaluation_shares()
        trainable = {id(parameter) for parameter in self.parameters() if parameter.requires_grad}
        frozen = [name for name, parameter in self.named_parameters() if id(parameter) not in trainable]
        buffers = [name for name, _ in self.named_buffers()]
        # every rank loads the same base model: nothing of it is broadcast
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen + buffers)

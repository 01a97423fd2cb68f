"""The window of a rollout: which of its steps are stochastic, stored and trained; the others follow the ODE."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from dblightning.noise import ImageNoise, image_seed
from dblightning.ode import Level, MultistepODE
from dblightning.settings import check
from dblightning.solvers import GaussianSolver
from dblightning.training_rules import NO_STEP, window_problems
from dblightning.training_settings import WindowSettings


class WindowedSolver:
    """A solver that is another's inside the window and follows the probability-flow ODE outside it.

    The steps up to the window's end are the other solver's, by index; those after it may be fewer.

    Args:
        solver: of the stochastic steps.
        start: index of the first stochastic step in its schedule.
        size: number of stochastic steps.
        tail_steps: denoiser calls for what follows the window; None takes every step left in the schedule.

    Attributes:
        timesteps: of every step that is taken, (n,).
        indices: each step's index in the solver's schedule.
    """

    def __init__(self, solver: GaussianSolver, start: int, size: int, tail_steps: int | None = None) -> None:
        total, stop = len(solver.timesteps), start + size
        left = total - stop
        tail = left if tail_steps is None else min(tail_steps, left)
        self.solver = solver
        self.start, self.size = start, size
        self.indices = [*range(stop), *(stop + step * left // tail for step in range(tail))]
        self.timesteps: Tensor = solver.timesteps[torch.tensor(self.indices)]
        self._levels = [Level(*pair) for pair in solver.levels().tolist()]
        self._ode = MultistepODE()

    def is_stochastic(self, step: int) -> bool:
        """Whether a step lies inside the window; its index is the one in the solver's schedule then."""
        return self.start <= step < self.start + self.size

    def initial(self, noise: Tensor) -> Tensor:
        """The solver's first latents; begins a run anew."""
        self._ode.forget()
        return self.solver.initial(noise)

    def scale(self, latents: Tensor, step_index: int) -> Tensor:
        """The latents as the denoiser wants them."""
        return self.solver.scale(latents, self.indices[step_index])

    def step(self, output: Tensor, latents: Tensor, step_index: int, noise: ImageNoise, copies: int = 1) -> Tensor:
        """The next latents; noise is drawn inside the window alone."""
        index = self.indices[step_index]
        if self.is_stochastic(step_index):
            self._ode.forget()
            return self.solver.step(output, latents, index, noise, copies)
        last = step_index + 1 == len(self.indices)
        end = self._levels[-1 if last else self.indices[step_index + 1]]
        return self._ode.step(self.solver.original(output, latents, index), latents, self._levels[index], end, last)


class Window:
    """Where the window of each rollout lies; a pure function of the rollout's number, so it needs no state.

    Args:
        settings: of the window.
        steps: denoising steps T of the solver's schedule.
        skipped: last steps that are never trained.
        seed: of the run; it draws random positions.
        needs: what the objective trains on, "trajectories" or "samples".
        draws: noises of each final sample, see ``Objective.noise_draws``.

    Attributes:
        stored: steps of a trajectory that are stored.
        trained: steps of them that are trained, the first ones.

    Raises:
        ValueError: a window that the schedule has no room for, or that does not go with the objective.
    """

    def __init__(
        self, settings: WindowSettings, steps: int, skipped: int, seed: int, needs: str = "trajectories", draws: int = 0
    ) -> None:
        noised = needs == "samples" and draws > 0
        check(
            settings.size is None or needs != "samples" or (settings.size == 0 and noised),
            "the objective trains on final samples, and a window stores its own steps alone; leave window.size out, "
            f"or set it to 0 for rollouts without noise, got {settings.size}",
        )
        check(settings.size != 0 or noised, NO_STEP)
        for problem in window_problems(asdict(settings), steps, skipped):  # a flow's last step is never trained
            raise ValueError(problem)
        self.settings, self.seed = settings, seed
        self.stored = 1 if noised else steps if settings.size is None else settings.size
        self.trained = settings.size or steps - skipped
        self.starts = settings.starts(steps, skipped)

    def start(self, rollout: int) -> int:
        """Index of the first stochastic step after so many rollouts: one for all images of all ranks."""
        count, settings = len(self.starts), self.settings
        if settings.position == "random":
            generator = torch.Generator().manual_seed(image_seed(self.seed, rollout, 0, "window"))
            return self.starts[int(torch.randint(count, (), generator=generator))]
        return self.starts[rollout // settings.every % count if settings.position == "sliding" else 0]

    def solver(self, solver: GaussianSolver, rollout: int) -> WindowedSolver | None:
        """What samples the rollout after so many; None where every step is stochastic, the solver itself."""
        size = self.settings.size
        return None if size is None else WindowedSolver(solver, self.start(rollout), size, self.settings.tail_steps)

"""What DB-MPA loses to the optimum of E[r(w)] − α·KL, and where: in closed form, and as far as the miniature shows it.

    python benchmarks/jensen_gap.py --json benchmarks/results/jensen_gap.json --figure docs/jensen_gap.png

Closed form. A base of two independent coordinates: a *decision* x (modes at ±1 of deviation δ, the right one of
probability p) and a *smooth* y (a standard Gaussian). In units of α, with S the strength, reward 1 is S/2 · x, which is
S between the modes; reward 2 is −S/4 · (y − 1)² − κ · S/2 · x: it costs some of the decision, as the miniature's
aesthetic adapter costs alignment. Both adapters are exact, so what a blend loses is Lemma 1's gaps and nothing else; by
Girsanov's theorem that loss is

    J* − J(blend) = α · KL(blend ‖ optimum) = α · E_blend ∫ ½ g² ‖Σ wᵢ Δᵢ − Δ_w‖² dt,

Δᵢ the Jensen gaps of eq. (8). The chain of 100 steps is solved by quadrature on a grid: no sampling.

Miniature. Nothing is known exactly there. From states x_t of base trajectories many base rollouts give the law of each
reward given x_t, and from it log E exp(r/α) − E r/α at α's that so few samples can resolve, and its second order,
Var(r | x_t)/(2α²).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.machine import describe, sentence
from benchmarks.publish import publish
from dblightning.backbone import DiffusersBackbone
from dblightning.data import MiniatureDataModule
from dblightning.gaussian_mixture import GaussianMixture, Quadratic, jensen_gap
from dblightning.miniature.rewards import ShapeAesthetic, ShapeAlignment
from dblightning.noise import ImageNoise
from dblightning.solvers import make_solver

# ── closed form ──────────────────────────────────────────────────────────────────────────────────────────────────────

#: variance of each step's noise, from data to noise: ᾱ ends at e^−14
BETAS = torch.linspace(0.002, 0.25, 100, dtype=torch.float64)
ALPHAS = (1 - BETAS).cumprod(0)
DEVIATIONS, STRENGTHS = (1.0, 0.5, 0.25, 0.125), (1.0, 2.0, 4.0, 8.0, 16.0)
#: κ and w of the settings
PREFERENCES = ((0.0, 0.5), (0.5, 0.2), (0.5, 0.5), (0.5, 0.8))


def decision(deviation: float, right: float) -> GaussianMixture:
    """Modes at ±1; ``right`` is the probability of the right one."""
    means, covariances = torch.tensor([[-1.0], [1.0]]).double(), torch.full((2, 1, 1), deviation**2).double()
    return GaussianMixture.of(torch.tensor([1 - right, right]).double(), means, covariances)


TERMS = ("reward 1", "reward 2", "r(w)")
SMOOTH = GaussianMixture.of(torch.ones(1).double(), torch.zeros(1, 1).double(), torch.ones(1, 1, 1).double())


def quadratic(curvature: float, slope: float) -> Quadratic:
    """½ curvature · x² + slope · x in one dimension."""
    return Quadratic(torch.tensor([[curvature]]).double(), torch.tensor([slope]).double())


class Chain:
    """The reverse chain in one coordinate on a grid, by quadrature.

    Args:
        base: of one dimension.
        reach: the grid ends at ± this; 0.04 from point to point, below every step's noise.
    """

    def __init__(self, base: GaussianMixture, reach: float) -> None:
        self.base = base
        self.grid = torch.linspace(-reach, reach, int(reach / 0.02) + 1, dtype=torch.float64)
        self.scores = self.scores_of(None)

    def scores_of(self, reward: Quadratic | None) -> Tensor:
        """∇ log p_t of the base or of p · exp(reward) on the grid, (T, N)."""
        model = self.base if reward is None else self.base.tilted(reward)
        return torch.stack([model.noised(float(alpha)).score(self.grid[:, None])[:, 0] for alpha in ALPHAS])

    def laws(self, scores: Tensor) -> list[Tensor]:
        """Laws of the policy with these scores, T + 1 of (N,): the final one first, that of pure noise last."""
        law = (-0.5 * self.grid**2).exp()
        found = [law / law.sum()]
        for beta, score in zip(BETAS.flip(0), scores.flip(0), strict=True):
            mean = (self.grid + beta * score) / (1 - beta).sqrt()
            kernel = (-0.5 * (self.grid[None, :] - mean[:, None]) ** 2 / beta).exp()
            found.append(found[-1] @ (kernel / kernel.sum(1, keepdim=True)))
        return found[::-1]

    def energies(self, laws: list[Tensor], apart: Tensor) -> Tensor:
        """E ½ g² ‖apart‖² of each step, (T,) nats, for a difference of scores (T, N): the KL of two such policies."""
        return (torch.stack(laws[1:]) * apart**2).sum(1) * BETAS / (2 * (1 - BETAS))

    def value(self, scores: Tensor, judged: Quadratic) -> float:
        """E[judged] − KL to the base of the policy with these scores."""
        laws = self.laws(scores)
        return float((laws[0] * judged(self.grid[:, None])).sum() - self.energies(laws, scores - self.scores).sum())

    def ends(self, law: Tensor) -> dict[str, float]:
        """Share of a final law on the right, and between the modes of a decision."""
        return {"right": float(law[self.grid > 0].sum()), "neither": float(law[self.grid.abs() < 0.5].sum())}

    def gap(self, reward: Quadratic) -> Tensor:
        """Δ of eq. (8) on the grid, (T, N)."""
        return torch.stack([jensen_gap(self.base, reward, self.grid[:, None], float(a))[:, 0] for a in ALPHAS])


def exact_value(base: GaussianMixture, own: Quadratic, judged: Quadratic) -> float:
    """E[judged] − KL of the exact model of a reward, in units of α."""
    tilted = base.tilted(own)
    return float(tilted.expected(judged) - tilted.expected(own) + base.log_expected_exp(own))


def coordinate(
    base: GaussianMixture, reach: float, rewards: tuple[Quadratic, Quadratic], weight: float
) -> dict[str, Any]:
    """One coordinate's part of everything: values by policy, DB-MPA's loss at each step, sizes of Lemma 1's terms."""
    chain, shares = Chain(base, reach), [weight, 1 - weight]
    judged = Quadratic.weighted(list(rewards), shares)
    models, best = [chain.scores_of(reward) for reward in rewards], chain.scores_of(judged)
    blend = sum(share * scores for share, scores in zip(shares, models, strict=True))
    laws = chain.laws(blend)
    singles = [chain.value(scores, judged) for scores in models]
    optimum, own = chain.value(best, judged), chain.value(chain.scores, judged)
    spent = chain.energies(laws, blend - chain.scores).sum()
    terms = [(share, reward) for share, reward in zip(shares, rewards, strict=True)] + [(1.0, judged)]
    finals = {"base": chain.laws(chain.scores)[0], "DB-MPA": laws[0], "optimum": chain.laws(best)[0]}
    exact = [exact_value(base, reward, judged) for reward in (*rewards, judged)]
    return {
        "base": own,
        "DB-MPA": float((laws[0] * judged(chain.grid[:, None])).sum() - spent),
        "optimum": optimum,
        "singles": singles,
        "loss": chain.energies(laws, blend - best),
        "terms": [float(chain.energies(laws, share * chain.gap(reward)).sum()) for share, reward in terms],
        "ends": {name: chain.ends(law) for name, law in finals.items()},
        "error": max(abs(one - other) for one, other in zip(exact, [*singles, optimum], strict=True)),
    }


@functools.cache
def smooth_part(strength: float, weight: float) -> dict[str, Any]:
    """:func:`coordinate` of the smooth one, to which reward 1 is indifferent."""
    return coordinate(SMOOTH, 6.0, (quadratic(0, 0), quadratic(-strength / 2, strength / 2)), weight)


def compared(deviation: float, strength: float, cost: float, weight: float, right: float) -> dict[str, Any]:
    """J = E[r(w)]/α − KL of every policy, DB-MPA's loss over the path, and the sizes of Lemma 1's terms."""
    half = strength / 2
    first = quadratic(0, half), quadratic(0, -cost * half)
    x = coordinate(decision(deviation, right), 2 + half * deviation**2 + 5 * max(deviation, 0.7), first, weight)
    y = smooth_part(strength, weight)
    singles = [one + other for one, other in zip(x["singles"], y["singles"], strict=True)]
    chord = weight * singles[0] + (1 - weight) * singles[1]
    base, blend, optimum = (x[name] + y[name] for name in ("base", "DB-MPA", "optimum"))
    loss = x["loss"] + y["loss"]
    return {
        "deviation": deviation,
        "strength": strength,
        "cost": cost,
        "weight": weight,
        "right": right,
        "less_base": {
            "DB-MPA": blend - base,
            "optimum": optimum - base,
            "reward 1 alone": singles[0] - base,
            "reward 2 alone": singles[1] - base,
            "random adapter": chord - base,
        },
        "less_better_single": blend - max(singles),
        "less_random": blend - chord,
        "lost": optimum - blend,
        "kl_to_optimum": float(loss.sum()),
        "lost_in_the_decision": float(x["loss"].sum()),
        "lost_by_alpha_bar": _by_noise(loss),
        "terms": {name: x["terms"][index] + y["terms"][index] for index, name in enumerate(TERMS)},
        "ends": x["ends"],
        "chain_error": x["error"] + y["error"],
    }


#: edges of ᾱ that the path is cut at: from noise to data
NOISE_EDGES = (0.0, 0.1, 0.5, 0.9, 1.0)


def _by_noise(loss: Tensor) -> list[float]:
    """Shares of a path's sum in each stretch of ᾱ."""
    total = loss.sum().clamp_min(1e-300)
    return [
        float(loss[(low <= ALPHAS) & (high > ALPHAS)].sum() / total) for low, high in itertools.pairwise(NOISE_EDGES)
    ]


def closed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every setting."""
    return [
        compared(deviation, strength, cost, weight, options.right)
        for cost, weight in PREFERENCES
        for deviation in DEVIATIONS
        for strength in STRENGTHS
    ]


# ── the miniature ────────────────────────────────────────────────────────────────────────────────────────────────────

STEPS, STARTS, LAWS = 20, (0, 3, 6, 10, 15), (0.1, 0.2, 0.5, 1.0)
REWARDS: dict[str, Any] = {"alignment": ShapeAlignment, "aesthetic": ShapeAesthetic}


@torch.no_grad()
def conditional_laws(options: argparse.Namespace) -> dict[str, Tensor]:
    """Rewards of base rollouts from states of base trajectories: each (starts, prompts, rollouts)."""
    backbone = DiffusersBackbone("miniature")
    prompts = MiniatureDataModule(limit_test_prompts=options.prompts).test_prompts
    solver = make_solver(backbone.scheduler_config, STEPS, 1.0)
    conditioning = backbone.encode(prompts)

    def step(x: Tensor, index: int, given: Any, noise: ImageNoise) -> Tensor:
        timesteps = solver.timesteps[index].expand(len(x))
        return solver.step(backbone.denoise(solver.scale(x, index), timesteps, given, 3.0), x, index, noise)

    noise = ImageNoise.of(0, list(range(len(prompts))), [0] * len(prompts), backbone.device, stream="evaluation")
    state = solver.initial(noise(backbone.latent_shape))
    many = torch.arange(len(prompts)).repeat_interleave(options.rollouts)
    scores: dict[str, list[Tensor]] = {name: [] for name in REWARDS}
    for index in range(max(STARTS) + 1):
        if index in STARTS:
            given, x = conditioning.rows(many), state[many]
            fresh = ImageNoise([1000 * index + 7_000_000 * (int(i) + 1) + j for j, i in enumerate(many)])
            for later in range(index, STEPS):
                x = step(x, later, given, fresh)
            images, texts = backbone.decode(x), [prompts[int(i)] for i in many]
            for name, reward in REWARDS.items():
                scores[name].append(reward().score(images, texts).double().view(len(prompts), -1))
        state = step(state, index, conditioning, noise)
    return {name: torch.stack(each) for name, each in scores.items()}


def gap_of(rewards: Tensor, alpha: float) -> Tensor:
    """α log E exp(r/α) − E r of samples (…, n), by a mean over n, biased low: n resolve a tilt of log n nats."""
    count = rewards.shape[-1]
    return alpha * (torch.logsumexp(rewards / alpha, -1) - math.log(count)) - rewards.mean(-1)


def two_groups(rewards: Tensor) -> Tensor:
    """Share of the variance of samples (…, n) that lies between the best two groups; 0.64 for a Gaussian, 1 for two."""
    ordered = rewards.sort(-1).values
    count = ordered.shape[-1]
    sums, total = ordered.cumsum(-1)[..., :-1], ordered.sum(-1, keepdim=True)
    left = torch.arange(1, count, dtype=ordered.dtype)
    between = left * (sums / left - total / count) ** 2
    between = between + (count - left) * ((total - sums) / (count - left) - total / count) ** 2
    whole = ((ordered - ordered.mean(-1, keepdim=True)) ** 2).sum(-1)
    return between.max(-1).values / whole.clamp_min(1e-12)


def estimated(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Per start: conditional deviations, how two-valued they are, gaps by α, and Lemma 1's terms at w = ½."""
    scores = conditional_laws(options)
    both = 0.5 * sum(scores.values())  # type: ignore[operator]
    found = []
    for index, start in enumerate(STARTS):
        laws = {name: each[index] for name, each in scores.items()} | {"r(w)": both[index]}
        point: dict[str, Any] = {"step": start, "rewards": {}, "mismatch": {}}
        for name, law in laws.items():
            point["rewards"][name] = {
                "std": float(law.var(1).mean().sqrt()),
                "two_groups": float(two_groups(law).mean()),
                "gap": {f"{alpha:g}": float(gap_of(law, alpha).mean()) for alpha in LAWS},
                "second_order": {f"{alpha:g}": float((law.var(1) / (2 * alpha)).mean()) for alpha in LAWS},
            }
        for alpha in LAWS:
            each = {name: gap_of(law, alpha) for name, law in laws.items()}
            over = 0.5 * each["alignment"] + 0.5 * each["aesthetic"] - each["r(w)"]
            point["mismatch"][f"{alpha:g}"] = {
                "mean": float(over.mean()),
                "half_width": float(1.96 * over.std() / len(over) ** 0.5),
                "of_alignment": float(0.5 * each["alignment"].mean()),
                "of_aesthetic": float(0.5 * each["aesthetic"].mean()),
                "of_the_sum": float(each["r(w)"].mean()),
            }
        found.append(point)
    return found


# ── tables and figure ────────────────────────────────────────────────────────────────────────────────────────────────


def closed_table(cases: list[dict[str, Any]]) -> str:
    """DB-MPA less the better single adapter, a random adapter and the optimum, by the modes' deviation and strength."""
    lines = []
    for cost, weight in PREFERENCES:
        lines += [
            f"κ = {cost:g}, w = {weight:g}: J of DB-MPA less the better single's (a random adapter's, the optimum's)",
            "",
            "| δ | " + " | ".join(f"S = {strength:g}" for strength in STRENGTHS) + " |",
            "|" + "---|" * (1 + len(STRENGTHS)),
        ]
        for deviation in DEVIATIONS:
            cells = [
                f"{case['less_better_single']:+.2f} ({case['less_random']:+.2f}; {-case['lost']:+.2f})"
                for case in cases
                if (case["deviation"], case["cost"], case["weight"]) == (deviation, cost, weight)
            ]
            lines.append(f"| {deviation:g} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def estimate_table(points: list[dict[str, Any]]) -> str:
    lines = [
        "| x_t before step | deviation given x_t: alignment, aesthetic | between two groups | Σ wᵢ gapᵢ − gap_w, α = "
        + ", ".join(f"{alpha:g}" for alpha in LAWS)
        + " | of it alignment, aesthetic, r(w) at α = 0.2 |",
        "|---|---|---|---|---|",
    ]
    for point in points:
        one, other = point["rewards"]["alignment"], point["rewards"]["aesthetic"]
        over = ", ".join(f"{each['mean']:.3f} ± {each['half_width']:.3f}" for each in point["mismatch"].values())
        terms = point["mismatch"]["0.2"]
        lines.append(
            f"| {point['step']} of {STEPS} | {one['std']:.2f}, {other['std']:.2f} | {one['two_groups']:.2f}, "
            f"{other['two_groups']:.2f} | {over} | {terms['of_alignment']:.3f}, {terms['of_aesthetic']:.3f}, "
            f"−{terms['of_the_sum']:.3f} |"
        )
    return "\n".join(lines)


def figure(record: dict[str, Any]) -> Any:
    """Regimes in closed form; where the gap lies along the path; the miniature's conditional deviations."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = drawn.subplots(1, 3)
    cases = [each for each in record["closed"] if each["weight"] == 0.5 and each["cost"] == 0.5]
    for deviation in DEVIATIONS:
        line = [each for each in cases if each["deviation"] == deviation]
        values = [each["less_better_single"] / each["strength"] for each in line]
        left.plot(STRENGTHS, values, "o-", label=f"modes' deviation {deviation:g}")
    left.axhline(0, color="0.5", linewidth=0.8)
    left.set(xscale="log", xlabel="strength S = reward / α", ylabel="J of DB-MPA less the better single's, over S")
    left.set_xticks(STRENGTHS, [f"{strength:g}" for strength in STRENGTHS])
    left.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    for each in cases:
        if each["deviation"] < 1 and each["strength"] in (2.0, 16.0):
            label = f"δ = {each['deviation']:g}, S = {each['strength']:g}: {each['lost']:.2f} lost"
            middle.plot(range(4), each["lost_by_alpha_bar"], "o-", label=label)
    edges = [f"{low:g}–{high:g}" for low, high in itertools.pairwise(NOISE_EDGES)]
    middle.set_xticks(range(4), edges)
    middle.set(xlabel="ᾱ, from noise to data", ylabel="share of the loss", ylim=(0, 1))
    middle.legend(frameon=False, fontsize=8)
    for name in REWARDS:
        values = [each["rewards"][name]["std"] for each in record["estimated"]]
        right.plot(STARTS, values, "o-", label=f"{name}: deviation given x_t")
    right.plot(STARTS, [each["mismatch"]["0.2"]["mean"] for each in record["estimated"]], "s--", color="k",
               label="Σ wᵢ gapᵢ − gap_w at α = 0.2")  # fmt: skip
    right.set(xlabel=f"step of {STEPS}", ylabel="reward", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def main() -> None:
    """Run the parts requested; those left out are taken from the record that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"closed": closed, "estimated": estimated}
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--right", type=float, default=0.2, help="probability of the decision's right mode")
    parser.add_argument("--prompts", type=int, default=20, help="of the conditional laws")
    parser.add_argument("--rollouts", type=int, default=24, help="from each state")
    parser.add_argument("--json", type=Path, help="record; the table goes beside it")
    parser.add_argument("--figure", type=Path, help="a PNG")
    options = parser.parse_args()
    torch.set_num_threads(1)
    there = options.json is not None and options.json.is_file()
    record: dict[str, Any] = json.loads(options.json.read_text(encoding="utf-8")) if there else {}
    for name in options.parts:
        started = time.process_time()
        record[name] = parts[name](options)
        record[f"{name}_settings"] = {"machine": describe(), "cpu_seconds": round(time.process_time() - started, 1)}
        given = vars(options).items()
        record[f"{name}_settings"] |= {key: value for key, value in given if key not in ("json", "figure", "parts")}
    tables = {"closed": closed_table, "estimated": estimate_table}
    text = "\n\n".join(tables[name](record[name]) for name in tables if name in record)
    publish(record, f"{text}\n\n{sentence(describe())}", options.json)
    if options.figure and all(name in record for name in parts):
        figure(record).savefig(options.figure, dpi=110)


if __name__ == "__main__":
    main()

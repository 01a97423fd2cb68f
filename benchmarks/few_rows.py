"""DB-MPA for fewer rows: error against cost, for two to four adapters and doubled ones, on the miniature.

    python benchmarks/few_rows.py --json benchmarks/results/few_rows.json --figure docs/few_rows.png

Same prompts and the same noise for all. The error is the distance of an image's final latents to DB-MPA's, mean over
images and divided by the exact Rewarded Soup's; the cost is denoiser rows per image and step, of which DB-MPA of m
adapters has m (guidance doubles them all). Compared are

* the exact soup and DB-MPA-LS in rotation, one row each;
* all rows for a first share of the steps, then LS in rotation;
* all rows for a first share, then one row in turn with the others' differences to it kept from the last full step: the
  option ``full_share`` of ``db-mpa``;
* the same with a full step every five steps after the first share: no option, for it buys no more than a larger share.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.ls_draws import final_latents
from benchmarks.machine import describe, sentence
from benchmarks.publish import publish
from benchmarks.soup_vs_blend import rescale
from dblightning import few_rows, miniature
from dblightning.backbone import DiffusersBackbone
from dblightning.blending import DBMPA, DBMPALS, Blend, BlendPlan, PartialStep, RewardedSoup
from dblightning.data import MiniatureDataModule

#: name → folder; the fourth is release 0.1's, trained by another recipe
ADAPTERS = {
    **{name: miniature.adapters()[name] for name in ("alignment", "aesthetic", "compressibility")},
    "aesthetic_0_1": miniature.adapters("0.1")["aesthetic"],
}


class Case(NamedTuple):
    """Adapters' weights in the order of :data:`ADAPTERS`, steps, and what every ΔW is multiplied by."""

    weights: tuple[float, ...]
    steps: int = 20
    scale: float = 1.0

    def title(self) -> str:
        weights = "/".join(f"{weight:.2g}" for weight in self.weights)
        return f"m = {len(self.weights)}, w = {weights}, T = {self.steps}" + (
            "" if self.scale == 1 else f", ΔW × {self.scale:g}"
        )


CASES = [
    Case((0.5, 0.5)),
    Case((0.3, 0.7)),
    Case((1 / 3,) * 3),
    Case((0.25,) * 4),
    Case((0.5, 0.5), scale=2.0),
    Case((0.25,) * 4, scale=2.0),
    Case((0.5, 0.5), steps=50),
]
SHARES, REFRESHES = (0.15, 0.25, 0.4, 0.5), (None, 5)


class Then(Blend):
    """One blend for the first share of the steps, then another."""

    def __init__(self, first: Blend, rest: Blend, share: float) -> None:
        self.first, self.rest, self.share = first, rest, share

    def start(self, adapters: Sequence[str], batch: int, num_steps: int, generators: Any = None) -> BlendPlan:
        first, rest = (each.start(adapters, batch, num_steps, generators) for each in (self.first, self.rest))
        until = round(self.share * num_steps)
        return lambda step_index: (first if step_index < until else rest)(step_index)


class Refreshed(DBMPA):
    """DB-MPA of some ``full_share`` with a full step every ``refresh`` steps after it."""

    def __init__(self, weights: dict[str, float], full_share: float, refresh: int) -> None:
        super().__init__(weights, full_share=full_share)
        self.refresh = refresh

    def start(self, adapters: Sequence[str], batch: int, num_steps: int, generators: Any = None) -> BlendPlan:
        exact = DBMPA(self.weights).start(adapters, batch, num_steps)
        full = few_rows.full_steps(num_steps, self.full_share)
        full |= (torch.arange(num_steps) - int(full.sum()) + 1).clamp_min(1) % self.refresh == 0
        mixes = torch.stack([exact(step_index).mix for step_index in range(num_steps)])
        now = few_rows.in_turn(mixes, ["", *adapters], full)
        return lambda step_index: PartialStep.of(exact(step_index), now[step_index])


def methods(weights: dict[str, float], steps: int) -> dict[str, Blend]:
    """Label → blend, DB-MPA first."""
    found: dict[str, Blend] = {"DB-MPA": DBMPA(weights), "exact soup": RewardedSoup(weights), "LS": DBMPALS(weights)}
    for share in (0.25, 0.5):
        found[f"full {share:g}, then LS"] = Then(DBMPA(weights), DBMPALS(weights), share)
    for refresh in REFRESHES:
        for share in SHARES if steps == 20 else SHARES[1:3]:
            label = f"full {share:g}, then in turn" + ("" if refresh is None else f", refresh {refresh}")
            kept = DBMPA(weights, full_share=share)
            found[label] = kept if refresh is None else Refreshed(weights, share, refresh)
    return found


@torch.no_grad()
def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Rows per image and step, and error with its 95 % half width, by method; which are on the lower edge."""
    backbone = DiffusersBackbone("miniature")
    backbone.adapters.merged_limit = 2 * len(ADAPTERS)
    weights = dict(zip(ADAPTERS, case.weights, strict=False))
    for name in weights:
        backbone.adapters.load(name, ADAPTERS[name], backbone.pipeline)
    rescale(backbone, case.scale)
    prompts = MiniatureDataModule(limit_test_prompts=options.images).test_prompts
    found: dict[str, dict[str, Any]] = {}
    distances = {}
    for label, blend in methods(weights, case.steps).items():
        backbone.rows_run, started = 0, time.process_time()
        latents = final_latents(backbone, blend, prompts, case.steps, options.batch)
        if label == "DB-MPA":
            exact = latents
        distances[label] = (latents - exact).flatten(1).norm(dim=1).double()
        rows = backbone.rows_run / len(prompts) / case.steps
        found[label] = {"rows": round(rows, 4), "cpu_seconds": round(time.process_time() - started, 1)}
    unit = distances["exact soup"].mean()
    for label, each in found.items():
        over = distances[label] / unit
        each |= {"error": float(over.mean()), "half_width": float(1.96 * over.std() / len(over) ** 0.5)}
        each["median"] = float(over.median())
    for each in found.values():
        each["on_the_edge"] = not any(
            other["rows"] <= each["rows"] and other["error"] < each["error"] for other in found.values()
        )
    return {"case": case.title(), **case._asdict(), "images": len(prompts), "methods": found}


def to_markdown(cases: list[dict[str, Any]]) -> str:
    """One row per method, one column per case; what is on the lower edge in bold."""
    labels = list(dict.fromkeys(label for case in cases for label in case["methods"]))
    lines = ["| method | " + " | ".join(case["case"] for case in cases) + " |", "|" + "---|" * (1 + len(cases))]
    for label in labels:
        cells = []
        for case in cases:
            each = case["methods"].get(label)
            text = "" if each is None else f"{each['rows']:.2f}: {each['error']:.2f} ± {each['half_width']:.2f}"
            cells.append(f"**{text}**" if each and each["on_the_edge"] else text)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


#: label's end → marker and colour
STYLES = [
    ("exact soup", "s", "tab:gray", "exact soup"),
    ("LS", "D", "tab:orange", "LS, and full steps then LS"),
    ("in turn", "o", "tab:blue", "full steps, then in turn"),
    ("refresh 5", "^", "tab:green", "the same, refreshed every 5 steps"),
]


def figure(cases: list[dict[str, Any]]) -> Any:
    """A panel per case: error against rows, the lower edge as a line."""
    from matplotlib.figure import Figure

    columns = 4
    height = -(-len(cases) // columns)
    drawn = Figure(figsize=(3.6 * columns, 3.2 * height), layout="constrained")
    panels = drawn.subplots(height, columns, squeeze=False, sharey=True).flatten()
    for axes in panels[len(cases) :]:
        axes.set_visible(False)
    for axes, case in zip(panels, cases, strict=False):
        points = {label: each for label, each in case["methods"].items() if label != "DB-MPA"}
        edge = sorted((each["rows"], each["error"]) for each in points.values() if each["on_the_edge"])
        axes.plot(*zip(*edge, strict=True), color="0.7", zorder=1)
        for end, marker, color, name in STYLES:
            chosen = [each for label, each in points.items() if label.endswith(end)]
            axes.errorbar(
                [each["rows"] for each in chosen],
                [each["error"] for each in chosen],
                [each["half_width"] for each in chosen],
                fmt=marker,
                color=color,
                markersize=5,
                elinewidth=0.6,
                label=name,
            )
        axes.axvline(len(case["weights"]), color="0.5", linestyle=":")
        axes.set(title=case["case"], xlabel="rows per image and step", ylim=(0, 1.4))
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("error / the exact soup's")
    panels[0].legend(frameon=False, fontsize=7)
    return drawn


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="test prompts, one image each")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path, help="record; the table goes beside it")
    parser.add_argument("--figure", type=Path, help="a PNG")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe()
    cases = []
    for case in CASES:
        cases.append(measure(case, options))
        print(to_markdown(cases[-1:]), flush=True)
    publish({"machine": machine, "cases": cases}, f"{to_markdown(cases)}\n\n{sentence(machine)}", options.json)
    if options.figure:
        figure(cases).savefig(options.figure, dpi=110)


if __name__ == "__main__":
    main()

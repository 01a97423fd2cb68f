"""What the page's controls say, and what is said of a look: no Gradio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dblightning.preset import Preset
from dblightning.studio.blends import Look
from dblightning.studio.pictures import shown

#: methods a slider makes sense for, with what the page calls them
METHODS = {
    "DB-MPA: mix the predictions at every step": "db-mpa",
    "DB-MPA-LS: one adapter drawn per step, the base's cost": "db-mpa-ls",
    "Rewarded Soup: average the weights exactly": "rewarded-soup",
    "Rewarded Soup of factors: as the paper's code averages": "rewarded-soup-factors",
}
#: those without a λ
WITHOUT_KL_SCALE = ("rewarded-soup", "rewarded-soup-factors", "single")
#: images that the history keeps, and seconds within which a further change replaces the last one: a drag is one entry
HISTORY, SAME_DRAG_S = 24, 2.0

#: beside the rewards to tick
TICKED = "Two: one slider. Three: a triangle to click on, and a slider each."


class Settings(NamedTuple):
    """Values of the page's controls, in the order in which they are passed."""

    prompts: str
    seed: float | None
    method: str
    kl_scale: float
    steps: float
    guidance_scale: float
    chosen: list[str]
    axis: float
    scheduled: bool  # the preset's own w(t) instead of the sliders
    sliders: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[Any]) -> Settings:
        """From the controls' values."""
        return cls._make((*values[:9], tuple(values[9:])))

    def weights(self, names: Sequence[str]) -> dict[str, float]:
        """Weight of each chosen adapter, sum 1.

        Raises:
            ValueError: none chosen, or all sliders at zero.
        """
        chosen = [name for name in names if name in (self.chosen or [])]
        if not chosen:
            raise ValueError("No reward is chosen: tick at least one.")
        if len(chosen) == 1:
            return {chosen[0]: 1.0}
        if len(chosen) == 2:
            return {chosen[0]: round(self.axis, 4), chosen[1]: round(1 - self.axis, 4)}
        strengths = {name: self.sliders[list(names).index(name)] for name in chosen}
        total = sum(strengths.values())
        if total <= 0:
            raise ValueError("All sliders are at zero: raise at least one.")
        return {name: value / total for name, value in strengths.items()}

    def preset(self, names: Sequence[str], like: Preset) -> Preset:
        """The preset of these values, with what they leave open as in ``like``.

        Raises:
            TypeError, ValueError: a value that cannot be.
        """
        if self.seed is None:
            raise ValueError("The seed is empty: give a whole number, 0 or more.")
        return like.replaced(
            weights=like.weights if self.scheduled else self.weights(names),
            kl_scale=float(self.kl_scale) if has_kl_scale(self.method) else 1.0,
            method=self.method,
            num_inference_steps=int(self.steps),
            guidance_scale=float(self.guidance_scale),
            seed=int(self.seed),
            method_options=like.method_options if self.method == like.method else None,
            note="",
        )


class Entry(NamedTuple):
    """One line of the history."""

    image: Any
    caption: str
    settings: Settings
    when: float


def has_kl_scale(method: str) -> bool:
    """Whether a method has a λ."""
    return method not in WITHOUT_KL_SCALE


def methods(like: Preset, one_rank: bool) -> list[tuple[str, str]]:
    """What the page calls its methods, and their names; a preset's own among them.

    Args:
        like: the preset.
        one_rank: whether the adapters have one rank, which averaging their factors needs.
    """
    known = [each for each in METHODS.items() if one_rank or each[1] != "rewarded-soup-factors"]
    own = [] if like.method in (*METHODS.values(), "base") else [(f"The preset's: {like.method}", like.method)]
    return [*known, *own]


def shares(weights: Mapping[str, float]) -> str:
    """Names and weights of those that are not zero."""
    return ", ".join(f"{name} {value:.2f}" for name, value in weights.items() if value)


def pairs(look: Look, prompts: Sequence[str]) -> list[tuple[Any, str]]:
    """Each prompt's blend and base, side by side."""
    pairs = []
    for image, base, prompt in zip(look.images, look.base, prompts, strict=True):
        what = f": {prompt}" if len(prompts) > 1 else ""
        pairs += [(shown(image), f"blend{what}"), (shown(base), f"base{what}")]
    return pairs


def place_label(weights: Mapping[str, float], chosen: int) -> str:
    """A place of a survey in few characters: w of the first of two; else who is there."""
    if chosen == 2:
        return f"w {next(iter(weights.values())):.2f}".rstrip("0").rstrip(".")
    used = [name for name, value in weights.items() if value]
    return used[0] if len(used) == 1 else " + ".join(used) if len(used) == 2 else "all"


def axis_label(names: Sequence[str]) -> str:
    """The one slider's label."""
    return f"w of {names[0]}; 1 − w is {names[1]}'s" if len(names) == 2 else "w"


def caption(preset: Preset) -> str:
    """A look's line in the history."""
    share = shares(preset.weights) if isinstance(preset.weights, Mapping) else "w(t)"
    return f"{share} · λ {preset.kl_scale:g} · {preset.method} · seed {preset.seed}"


def score_rows(look: Look) -> list[list[str]]:
    """Reward, blend, base and gain, means over the prompts."""
    blend, base = look.means(), look.means(base=True)
    return [[name, f"{blend[name]:.3f}", f"{base[name]:.3f}", f"{blend[name] - base[name]:+.3f}"] for name in blend]


def remembered(history: list[Entry], entry: Entry) -> list[Entry]:
    """The history with one more entry; a drag's values replace each other."""
    if history and history[-1].settings == entry.settings:
        return history
    last = history[-1] if history else None
    if last is not None and entry.when - last.when < SAME_DRAG_S:
        history = history[:-1]
    return [*history, entry][-HISTORY:]

"""The model card of shared adapters: what they are, what they gain, how to use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dblightning import __version__
from dblightning.adapters.lora import LoraFile

TEMPLATE = Path(__file__).parent / "model_card.md.j2"
#: an evaluation's settings that a card names, as the record of its score table has them
SETTINGS = ("num_inference_steps", "eta", "guidance_scale", "negative_prompt", "noise")
#: blends in a card's table at most; the adapters alone come first
MAX_ROWS = 16


@dataclass
class Gains:
    """Gains over the base model as a card shows them.

    Attributes:
        table: a Markdown table, one row per blend, one column per reward.
        where: prompts, seeds and settings of the evaluation, in a sentence.
        held_out: rewards that no blend weighs.
        left_out: blends of the table that the card has no place for.
    """

    table: str
    where: str
    held_out: list[str] = field(default_factory=list)
    left_out: int = 0


def gains_of(path: str | Path, level: float = 0.95) -> Gains:
    """Gains of a score table's blends over its base, paired, with bootstrap intervals over prompts.

    Raises:
        FileNotFoundError, ValueError: not a score table; or one without a base, over which nothing is a gain.
    """
    from dblightning.evaluation.analysis import GAIN, estimate
    from dblightning.evaluation.cells import cell, estimate_cell, readable_labels
    from dblightning.evaluation.scores import REWARD, read_scores
    from dblightning.evaluation.table_formats import pipe_table

    frame, record = read_scores(path)
    estimates = estimate(frame, level=level)
    blends = estimates.blends
    base = blends.loc[blends["method"] == "base", "blend"]
    if base.empty:
        raise ValueError(f"{path} has no base to gain over; evaluate {{method: base}} with the others")
    labels = readable_labels(estimates)
    alone = blends["method"] == "single"
    order = [*blends.loc[alone, "blend"], *blends.loc[~alone & (blends["method"] != "base"), "blend"]]
    rows = [
        [labels[blend], *(estimate_cell(estimates, blend, GAIN + name, sign=True) for name in estimates.rewards)]
        for blend in order[:MAX_ROWS]
    ]
    means = [cell(estimates.of(base.iloc[0], REWARD + name)) for name in estimates.rewards]
    rows.append(["base model, its mean", *means])
    prompts, seeds = frame["prompt_id"].nunique(), frame["seed"].nunique()
    settings = [f"{name} {record[name]}" for name in SETTINGS if record.get(name) is not None]
    unit = "prompts" if prompts > 1 else "seeds of one prompt"
    where = (
        f"{prompts} prompts × {seeds} seeds{''.join(f', {each}' for each in settings)}; the same noise for every row, "
        f"gains paired, {level:.0%} bootstrap intervals over {unit}"
    )
    table = pipe_table(rows, ["blend", *estimates.rewards])
    return Gains(table, where, estimates.held_out, max(0, len(order) - MAX_ROWS))


def adapter_rows(files: Mapping[str, LoraFile]) -> list[dict[str, str]]:
    """What a card says of each adapter: name, reward, rank, KL weight, images it was trained on, digest."""
    rows = []
    for name, file in files.items():
        facts = file.facts
        found = facts.get("hyperparameters") or {}
        kl = found.get("kl")
        weight = facts.get("kl_weight", found.get("kl_weight", kl.get("weight") if isinstance(kl, Mapping) else None))
        modules = file.modules.get(file.denoiser, {})
        rows.append(
            {
                "name": name,
                "reward": str(facts.get("reward", "not recorded")),
                "rank": " / ".join(map(str, sorted({each.rank for each in modules.values()}))),
                "kl_weight": "not recorded" if weight is None else f"{weight:g}",
                "images": str(facts.get("images", "not recorded")),
                "sha256": str(facts["sha256"]),
            }
        )
    return rows


def model_card(
    repo: str,
    base: str,
    licence: str,
    files: Mapping[str, LoraFile],
    soup: LoraFile | None = None,
    gains: Gains | None = None,
    preset: Any = None,
    pictures: Sequence[str] = (),
    title: str | None = None,
) -> str:
    """A model card as the hub reads it: metadata in YAML, then Markdown.

    Args:
        repo: USER/NAME.
        base: hub id of the base model, or "miniature", which has none.
        licence: the hub's short name of a licence.
        files: the adapters, with ``sha256`` among their facts.
        soup: the LoRA at the repository's root.
        gains: of an evaluation.
        preset: a :class:`dblightning.preset.Preset` that lies in the repository.
        pictures: their paths in the repository.
        title: heading; None takes the repository's name.
    """
    from huggingface_hub import ModelCard, ModelCardData

    known = None if base == "miniature" else base
    relation: dict[str, Any] = {} if known is None else {"base_model_relation": "adapter"}
    data = ModelCardData(
        base_model=known,
        license=licence,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["lora", "diffusers", "text-to-image", "reinforcement-learning", "dblightning"],
        **relation,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title or repo.rpartition("/")[2],
        repo=repo,
        base=base,
        licence=licence,
        adapters=adapter_rows(files),
        soup=None if soup is None else soup_lines(soup),
        gains=gains,
        preset=None if preset is None else preset.to_yaml().strip(),
        pictures=list(pictures),
        version=__version__,
    )
    return str(card)


def soup_lines(soup: LoraFile) -> dict[str, str]:
    """What a card says of the LoRA at the root."""
    facts = soup.facts
    weights = ", ".join(f"{name} {weight:g}" for name, weight in (facts.get("weights") or {}).items())
    error = facts.get("relative_error")
    return {
        "weights": weights,
        "rank": str(facts.get("rank", "not recorded")),
        "error": "" if not error else f"{error:.3g}",
        "sha256": str(facts["sha256"]),
    }

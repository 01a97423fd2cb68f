"""Figures, drawn with matplotlib from plain tensors and tables; no model here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from dblightning.figure_text import figure_text, wrapped


def _show(axis: Any, image: Tensor) -> None:
    axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


def before_after_figure(
    before: Tensor, after: Tensor, prompts: Sequence[str], before_scores: Tensor, after_scores: Tensor, reward: str
) -> Figure:
    """Two rows of images, the base model's above the adapter's, each with its reward.

    Args:
        before, after: images (B, 3, H, W) in [0, 1].
        prompts: B captions.
        before_scores, after_scores: rewards, (B,).
        reward: the reward's name.
    """
    count = len(prompts)
    figure = Figure(figsize=(1.25 * count, 3.5), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    for row, (images, scores) in enumerate([(before, before_scores), (after, after_scores)]):
        for column in range(count):
            axis = axes[row][column]
            _show(axis, images[column])
            axis.set_xlabel(f"{scores[column].item():+.2f}", fontsize=8)
    for column, prompt in enumerate(prompts):
        axes[0][column].set_title(wrapped(prompt, 16, lines=5), fontsize=7)
    axes[0][0].set_ylabel("before")
    axes[1][0].set_ylabel("after")
    figure.suptitle(
        f"{figure_text(reward)}: {before_scores.mean().item():+.2f} before, {after_scores.mean().item():+.2f} after",
        fontsize=9,
    )
    return figure


def blend_grid_figure(images: Tensor, columns: Sequence[str], rows: Sequence[str]) -> Figure:
    """A grid of images, one row per prompt and one column per blend, same noise along a row.

    Args:
        images: (rows, columns, 3, H, W) in [0, 1].
        columns: one title per column.
        rows: one label per row.
    """
    # a column of 1.1 inches takes 15 characters of 7 points; wrapped headings give the figure their height
    titles = [wrapped(title, 15, lines=8) for title in columns]
    labels = [wrapped(label, 18, lines=7) for label in rows]
    heading = 0.14 * max((title.count("\n") + 1 for title in titles), default=1)
    figure = Figure(figsize=(1.1 * len(columns) + 1.5, 1.1 * len(rows) + 0.5 + heading))
    figure.set_layout_engine("constrained", h_pad=0.08)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for row, label in enumerate(labels):
        for column, title in enumerate(titles):
            axis = axes[row][column]
            _show(axis, images[row, column])
            if row == 0:
                axis.set_title(title, fontsize=7)
        axes[row][0].set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
    return figure

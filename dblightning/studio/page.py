"""The studio's page, of Gradio's own components."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dblightning.extras import importing
from dblightning.preset import Preset
from dblightning.studio.blends import Blends, Look, Mark, read_prompts
from dblightning.studio.compare import read_report
from dblightning.studio.controls import (
    TICKED,
    Entry,
    Settings,
    axis_label,
    caption,
    has_kl_scale,
    methods,
    pairs,
    place_label,
    remembered,
    score_rows,
    shares,
)
from dblightning.studio.pictures import Map, filmstrip, frame_at, pareto_map, shown, triangle, weights_at
from dblightning.studio.take_away import diffusers_lines, merged_lora, plain_weights

with importing("the studio", "studio"):
    import gradio as gr


class Studio:
    """The page's functions.

    Args:
        blends: images and scores.
        like: preset that the page starts from.
        scores: score tables that the Compare tab offers.
    """

    def __init__(self, blends: Blends, like: Preset, scores: Sequence[Path] = ()) -> None:
        self.blends = blends
        self.like = like
        self.scores = list(scores)
        self.names = blends.shared.adapters
        bank = blends.shared.pipe.adapters
        self.one_rank = len({bank.settings(name)["rank"] for name in self.names}) == 1
        self.folder = tempfile.TemporaryDirectory(prefix="dblightning-studio-")

    # ── what the controls do ─────────────────────────────────────────────────────────────────────────────────────────

    def develop(self, drawn: Map | None, history: list[Entry], *values: Any) -> tuple[Any, ...]:
        """Make the blend's images and everything that is said of them.

        Returns:
            message, images, scores, triangle, map, history, its gallery, preset, lines.
        """
        settings = Settings.of(values)
        try:
            prompts = read_prompts(settings.prompts)
            preset = settings.preset(self.names, self.like)
            look = self.blends.look(prompts, preset)
        except (TypeError, ValueError) as error:
            return (f"⚠️ {error}", *[gr.skip()] * 8)
        history = remembered(history, Entry(shown(look.images[0]), caption(preset), settings, time.monotonic()))
        return (
            " ".join(f"⚠️ {note}" for note in look.notes),
            pairs(look, prompts),
            score_rows(look),
            self.triangle(settings),
            gr.skip() if drawn is None else drawn.showing(look.means()),
            history,
            [(entry.image, entry.caption) for entry in reversed(history)],
            preset.to_yaml(),
            diffusers_lines(self.blends.shared.pipe, preset, prompts[0]),
        )

    def survey(self, marks: list[Mark], key: Any, *values: Any) -> tuple[Any, ...]:
        """Make the strip and the map's points, unless they are there already.

        Returns:
            strip, map, the map with its points, marks, their key.
        """
        settings = Settings.of(values)
        chosen = [name for name in self.names if name in (settings.chosen or [])]
        wanted = repr(settings._replace(axis=0.0, sliders=(), scheduled=False, chosen=chosen))
        if wanted == key:
            return (gr.skip(),) * 5
        try:
            prompts = read_prompts(settings.prompts)
            preset = settings.preset(self.names, self.like)
            settings.weights(self.names)
            marks = self.blends.survey(prompts, preset, chosen)
            look = self.blends.look(prompts, preset)
        except (TypeError, ValueError):
            return (gr.skip(),) * 5  # develop has said it
        drawn = self.map(marks, look, settings.chosen)
        strip = filmstrip([mark.image for mark in marks], [place_label(mark.weights, len(chosen)) for mark in marks])
        return strip, drawn.showing(look.means()), drawn, marks, wanted

    def map(self, marks: Sequence[Mark], look: Look, ticked: Sequence[str]) -> Map:
        """The Pareto map of a survey, with the base of a look."""
        chosen = [name for name in self.names if name in ticked]
        scored = [name for name in chosen if name in self.blends.rewards]
        rewards = [*scored, *(name for name in self.blends.rewards if name not in scored)][:2]
        labels = [place_label(mark.weights, len(chosen)) for mark in marks]
        if len(chosen) == 2:  # the line shows the order; its ends and middle are enough
            labels = [label if i in (0, len(marks) // 2, len(marks) - 1) else "" for i, label in enumerate(labels)]
        else:
            labels = ["" if " + " in label else label for label in labels]
        if len(rewards) < 2:
            return pareto_map([], ["", ""], {}, [])
        return pareto_map(marks, rewards, look.means(base=True), labels)

    def triangle(self, settings: Settings) -> Any:
        """The triangle, where three rewards are chosen."""
        chosen = [name for name in self.names if name in (settings.chosen or [])]
        if len(chosen) != 3:
            return gr.skip()
        return triangle(chosen, settings.weights(self.names))

    def place(self, weights: Mapping[str, float]) -> tuple[Any, ...]:
        """Values of the axis, of "w(t)" and of every slider that say these weights."""
        first = next(iter(weights.values()))
        return (first, False, *(weights.get(name, 0.0) for name in self.names))

    def from_triangle(self, chosen: list[str], event: gr.SelectData) -> tuple[Any, ...]:
        """A click on the triangle."""
        names = [name for name in self.names if name in chosen]
        return self.place(dict(zip(names, weights_at(*event.index), strict=True)))

    def from_map(self, marks: list[Mark], drawn: Map | None, event: gr.SelectData) -> tuple[Any, ...]:
        """A click on the map takes the nearest point."""
        nearest = None if drawn is None else drawn.nearest(*event.index)
        if nearest is None:
            return (gr.skip(),) * (2 + len(self.names))
        return self.place(marks[nearest].weights)

    def from_strip(self, marks: list[Mark], event: gr.SelectData) -> tuple[Any, ...]:
        """A click on the strip."""
        return self.place(marks[frame_at(event.index[0], event.index[1], len(marks))].weights)

    def from_history(self, history: list[Entry], event: gr.SelectData) -> tuple[Any, ...]:
        """A click on the history: every control as it was."""
        settings = history[len(history) - 1 - event.index].settings
        return (*settings[:9], *settings.sliders)

    def chosen(self, chosen: list[str]) -> tuple[Any, ...]:
        """Controls for the rewards that are ticked: axis, triangle, sliders."""
        names = [name for name in self.names if name in chosen]
        axis = gr.update(visible=len(names) == 2, label=axis_label(names))
        sliders = [gr.update(visible=len(names) > 2 and name in names) for name in self.names]
        return axis, gr.update(visible=len(names) == 3), *sliders

    def merged(self, *values: Any) -> tuple[Any, ...]:
        """The merged LoRA's file, and what is said of it."""
        try:
            preset = Settings.of(values).preset(self.names, self.like)
            weights = plain_weights(preset)
            file = merged_lora(self.blends.shared, preset, Path(self.folder.name))
        except (TypeError, ValueError) as error:
            return gr.skip(), f"⚠️ {error}"
        return str(file), f"ΔW = λ Σ wᵢ ΔWᵢ of {shares(weights)}, λ = {preset.kl_scale:g}, exactly."

    def report(self, scores: str | None, uploaded: str | None) -> tuple[Any, ...]:
        """The Compare tab: verdict, table, picture, page."""
        known = {str(each): each for each in self.scores}
        file = Path(uploaded) if uploaded else known.get(scores or "")
        if file is None:
            return "⚠️ Choose a score table, or upload one.", gr.skip(), gr.skip(), gr.skip()
        try:
            found = read_report(file, Path(self.folder.name))
        except (ImportError, OSError, ValueError, KeyError) as error:
            return f"⚠️ {error}", gr.skip(), gr.skip(), gr.skip()
        return found.verdict, found.table, found.picture, str(found.page)


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def build_page(studio: Studio) -> gr.Blocks:
    """The page of a studio."""
    with gr.Blocks(title="dblightning studio", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        with gr.Tab("Blend"):
            _blend_tab(page, studio)
        with gr.Tab("Compare"):
            _compare_tab(studio)
    return page


def _blend_tab(page: gr.Blocks, studio: Studio) -> None:
    like, names = studio.like, studio.names
    started = like.weights if isinstance(like.weights, Mapping) else {}
    knots = [] if like.weights is None or isinstance(like.weights, Mapping) else list(like.weights)
    named = {name for knot in knots for name in knot} or set(started)
    chosen_first = [name for name in names if name in named] or names[:2]
    has_schedule = bool(knots)
    marks, key = gr.State([]), gr.State(None)
    drawn, history = gr.State(None), gr.State([])
    with gr.Row():
        with gr.Column(scale=3, min_width=280):
            prompts = gr.Textbox("A red circle.", label="Prompts, one a line", lines=1, max_lines=8, elem_id="prompts")
            make = gr.Button("Make", variant="primary", elem_id="make")
            message = gr.Markdown(elem_id="message")
            images = _gallery("This blend, and the base from the same noise", "images", columns=2)
            scores = gr.Dataframe(
                headers=["reward", "blend", "base", "gain"], interactive=False, elem_id="scores", buttons=[],
                label="Scores, means over the prompts", column_widths=["37%", "21%", "21%", "21%"], wrap=True,
            )  # fmt: skip
        with gr.Column(scale=2, min_width=280):
            chosen = gr.CheckboxGroup(
                names, value=chosen_first, label="Rewards to blend", elem_id="chosen", info=TICKED
            )
            axis = gr.Slider(
                0, 1, started.get(chosen_first[0], 0.5) if chosen_first else 0.5, step=0.01, elem_id="axis",
                label=axis_label(chosen_first), visible=len(chosen_first) == 2, interactive=not has_schedule,
            )  # fmt: skip
            scheduled = gr.Checkbox(
                has_schedule,
                label="The preset's w(t), instead of the sliders",
                visible=has_schedule,
                elem_id="scheduled",
            )
            corner = _picture("Click for weights", "triangle", visible=len(chosen_first) == 3)
            sliders = [
                gr.Slider(
                    0, 1, started.get(name, 0.5), step=0.01, label=name, elem_id=f"weight-{name}",
                    visible=len(chosen_first) > 2 and name in chosen_first, interactive=not has_schedule,
                )
                for name in names
            ]  # fmt: skip
            kl_scale = gr.Slider(
                0, max(3, like.kl_scale), like.kl_scale, step=0.05, elem_id="kl",
                label="λ: 0 the base, 1 the adapters, above 1 beyond them",
            )  # fmt: skip
            with gr.Accordion("Sampling", open=False, elem_id="sampling"):
                first_method = "db-mpa" if like.method == "base" else like.method
                method = gr.Dropdown(
                    methods(like, studio.one_rank), value=first_method, label="Method", elem_id="method"
                )
                steps = gr.Slider(1, 100, like.num_inference_steps, step=1, label="Denoising steps", elem_id="steps")
                own = studio.blends.shared.pipe.backbone.family.guidance_scale
                guidance_first = own if like.guidance_scale is None else like.guidance_scale
                most = max(15, guidance_first)
                guidance = gr.Slider(1, most, guidance_first, step=0.1, label="Guidance", elem_id="guidance")
            with gr.Row(equal_height=True):
                seed = gr.Number(like.seed or 0, precision=0, minimum=0, label="Seed", elem_id="seed", min_width=120)
                another = gr.Button("Another seed", elem_id="another", min_width=120)
            gr.Markdown("Rewards over w: click a point to choose it")
            picture = _picture("Rewards over w: click a point to choose it", "map")
    gr.Markdown("Over w: click an image to choose it")
    strip = _picture("Over w: click an image to choose it", "strip")
    with gr.Accordion("Use this", open=False, elem_id="use"):
        gr.Markdown("The preset, for the pipeline, the service and this page:")
        preset = gr.Code(language="yaml", label="preset.yaml", elem_id="preset", interactive=False)
        gr.Markdown("In plain diffusers, with the merged LoRA (the exact Rewarded Soup; DB-MPA to first order in ΔW):")
        lines = gr.Code(language="python", label="Plain diffusers", elem_id="lines", interactive=False, wrap_lines=True)
        merge = gr.Button("Write the merged LoRA", elem_id="merge")
        said = gr.Markdown(elem_id="merged-message")
        file = gr.File(label="Merged LoRA", elem_id="merged", interactive=False)
    past = _gallery("History: click one to go back", "history", columns=6, allow_preview=False)

    controls = [prompts, seed, method, kl_scale, steps, guidance, chosen, axis, scheduled, *sliders]
    developed = [message, images, scores, corner, picture, history, past, preset, lines]
    surveyed = [strip, picture, drawn, marks, key]

    def after(event: Any) -> None:
        """What follows once the controls say something new: the images at once, the survey after them."""
        ended = event(
            studio.develop, [drawn, history, *controls], developed, show_progress="hidden", api_visibility="private"
        )
        ended.then(studio.survey, [marks, key, *controls], surveyed, show_progress="minimal", api_visibility="private")

    live = [each.input for each in (axis, scheduled, *sliders, kl_scale, steps, guidance)]
    after(lambda *args, **options: gr.on(live, *args, trigger_mode="always_last", **options))
    others = [make.click, prompts.submit, seed.change]
    after(lambda *args, **options: gr.on(others, *args, **options))
    after(page.load)
    private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    after(chosen.input(studio.chosen, chosen, [axis, corner, *sliders], **private).then)
    moved = [axis, *sliders]
    scheduled.change(lambda ticked: [gr.update(interactive=not ticked)] * len(moved), scheduled, moved, **private)
    after(method.input(_kl_slider, [method, kl_scale], kl_scale, **private).then)
    another.click(_another_seed, None, seed, **private)
    spots = [axis, scheduled, *sliders]
    after(corner.select(studio.from_triangle, chosen, spots, **private).then)
    after(picture.select(studio.from_map, [marks, drawn], spots, **private).then)
    after(strip.select(studio.from_strip, marks, spots, **private).then)
    returned = past.select(studio.from_history, history, controls, **private)
    after(returned.then(studio.chosen, chosen, [axis, corner, *sliders], **private).then)
    merge.click(studio.merged, controls, [file, said], api_visibility="private")


def _gallery(label: str, name: str, columns: int, **options: Any) -> gr.Gallery:
    gr.Markdown(label)
    # a height of its content: the default leaves half a screen empty under a row of images
    return gr.Gallery(
        show_label=False, label=label, elem_id=name, columns=columns, object_fit="contain", format="png", buttons=[],
        interactive=False, height="max-content", fit_columns=False, **options,
    )  # fmt: skip


def _picture(label: str, name: str, **options: Any) -> gr.Image:
    """A picture that is clicked on; a label on it would hide a corner."""
    return gr.Image(
        type="pil", format="png", interactive=False, label=label, show_label=False, buttons=[], elem_id=name, **options
    )


def _kl_slider(method: str, kl_scale: float) -> Any:
    """λ's slider, at rest where the method has none."""
    has = has_kl_scale(method)
    return gr.update(interactive=has, value=kl_scale if has else 1.0)


def _another_seed() -> int:
    import secrets

    return secrets.randbelow(2**31)


def _compare_tab(studio: Studio) -> None:
    gr.Markdown("The report of an evaluation (`python -m dblightning test`), from its `scores.parquet`.")
    with gr.Row():
        tables = [str(each) for each in studio.scores]
        scores = gr.Dropdown(
            tables,
            value=tables[0] if tables else None,
            label="Score table",
            visible=bool(tables),
            elem_id="scores-file",
        )
        uploaded = gr.File(label="or upload one", file_types=[".parquet"], elem_id="upload", height=120)
    show = gr.Button("Show the report", variant="primary", elem_id="report")
    verdict = gr.Markdown(elem_id="verdict")
    picture = gr.Image(label="Pareto fronts", show_label=False, interactive=False, buttons=[], elem_id="fronts")
    table = gr.Dataframe(label="Blends, means with 95 % intervals", interactive=False, wrap=True, elem_id="table")
    page = gr.File(label="The whole report, one page", interactive=False, elem_id="page")
    show.click(studio.report, [scores, uploaded], [verdict, table, picture, page], api_visibility="private")


def launch(studio: Studio, host: str = "127.0.0.1", port: int = 7860, **options: Any) -> Any:
    """Open the page.

    Args:
        studio: what it shows.
        host, port: address.
        options: of ``gradio.Blocks.launch``.
    """
    page = build_page(studio)
    page.queue(default_concurrency_limit=2, max_size=64)
    # fonts of the visitor's own machine: nothing is fetched from elsewhere
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return page.launch(
        server_name=host, server_port=port, theme=theme, footer_links=[], show_error=True, ssr_mode=False, **options
    )

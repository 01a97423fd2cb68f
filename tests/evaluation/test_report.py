from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

pytest.importorskip("plotly", reason="needs pip install 'dblightning[report]'")

from dblightning.evaluation import report, report_parts
from dblightning.evaluation.analysis import estimate
from dblightning.evaluation.merge import read_all
from dblightning.evaluation.report import print_summary, report_main, write_report
from dblightning.evaluation.report_parts import IMAGE_BYTES, image_grids, image_uri, pareto_plots
from dblightning.evaluation.scores import preference_sets, write_scores
from dblightning.evaluation.table_formats import pipe_table
from tests.evaluation.synthetic import blend, evaluation, preference, score_table

RECORD = {
    "base": "miniature", "eta": 1.0, "num_inference_steps": 20, "command": "python -m dblightning test --x '<y>'",
    "adapters": {"alignment": {"path": "runs/a", "sha256": "12"}}, "versions": {"torch": "2.13"},
}  # fmt: skip


class Page(HTMLParser):
    """Elements and text of a page; complains about elements left open."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def write_images(folder: Path, frame: pd.DataFrame, side: int = 32, prompts: int = 2) -> None:
    rng = np.random.default_rng(0)
    for label in frame["blend"].unique():
        (folder / label).mkdir(parents=True)
        for prompt in range(prompts):
            Image.fromarray(rng.integers(0, 256, (side, side, 3)).astype(np.uint8)).save(
                folder / label / f"{prompt}-0.png"
            )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation with images, and its report."""
    folder, frame = tmp_path_factory.mktemp("evaluation"), evaluation()
    write_scores(folder / "scores.parquet", frame, RECORD)
    write_images(folder / "images", frame)
    write_report(folder / "scores.parquet", folder)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_takes_nothing_from_other_files_or_from_a_network(page: Page) -> None:
    links = [value for _, attributes in page.elements for name in ("src", "href") if (value := attributes.get(name))]
    assert len(links) > 20
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert not page.all("link") and "@import" not in page.text


def test_every_link_within_the_page_has_its_section(page: Page) -> None:
    names = {attributes.get("id") for _, attributes in page.elements}
    assert {str(link["href"])[1:] for link in page.all("a")} <= names


def test_the_page_names_every_method_the_command_the_versions_and_held_out_rewards(page: Page) -> None:
    for name in ("Base", "single adapter", "DB-MPA", "DB-MPA-LS", "DB-MPA-LS (systematic)", "DB-KLA", "CoDe", "RGG",
                 "Rewarded Soup (factors)", "MORL (oracle)"):  # fmt: skip
        assert name in page.text
    assert "python -m dblightning test --x '<y>'" in page.text
    assert "versions.torch 2.13" in page.text and "adapters.alignment.sha256 12" in page.text
    assert "Held-out rewards, which no blend weighs: held." in page.text
    assert "25 blends on 12 prompts × 2 seeds, 600 images" in page.text
    assert "Hypervolume above the reference point (alignment" in page.text


def test_prompts_are_escaped_and_are_row_headings(folder: Path, page: Page) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "prompt <0>" not in text
    assert re.search(r'<th scope="rowgroup"[^>]*>prompt &lt;0&gt; &amp; more \(seed 0\)</th>', text)
    assert "prompt <0> & more" in page.text


def test_tables_have_captions_and_scoped_headings_and_images_a_text(page: Page) -> None:
    assert len(page.all("caption")) == len(page.all("table")) > 8
    assert all(heading.get("scope") for heading in page.all("th"))
    assert all(image.get("alt") for image in page.all("img"))
    assert page.all("html")[0]["lang"] == "en"


def test_a_row_of_images_shows_the_blends_of_its_weights(folder: Path, page: Page) -> None:
    shown = [str(image["alt"]) for image in page.all("img") if str(image["src"]).startswith("data:image/png")]
    # the first row is the best single adapter's, whose images are that adapter's: at w ≠ 0.5 the one that w favours
    assert [shown[each] for each in (0, 1, 2, 4, 5)] == ["Base", *["aesthetic adapter"] * 2, *["alignment adapter"] * 2]
    assert shown[6:12] == [
        "Base", "aesthetic adapter", "DB-MPA: alignment 0.2, aesthetic 0.8", "DB-MPA: alignment 0.5, aesthetic 0.5",
        "DB-MPA: alignment 0.8, aesthetic 0.2", "alignment adapter",
    ]  # fmt: skip
    # pictures of 32 pixels are embedded as they are
    named = "DB-MPA: alignment 0.5, aesthetic 0.5"
    first = next(str(image["src"]) for image in page.all("img") if image["alt"] == named)
    assert first == image_uri(folder / "images" / "db-mpa_0.5" / "0-0.png")


def test_the_plots_code_is_in_the_page_once_and_the_page_stays_small(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.count("plotly.js v") == 1 and len(text) < 8_000_000


def test_hovering_shows_weights_rewards_gain_seconds_and_whether_dominated() -> None:
    frame = evaluation()
    estimates = estimate(frame)
    (plot,) = pareto_plots(estimates, ["alignment", "aesthetic"])
    traces = json.loads(re.search(r'Plotly\.newPlot\(\s*"[^"]+",\s*(\[.*?\]),\s*\{"template', plot, re.S)[1])  # type: ignore[index]
    traces = {trace["name"]: trace for trace in traces}
    hover = traces["RGG"]["hovertext"][1]
    value = estimates.of("rgg_0.5", "reward/alignment")[0]
    assert "w = 0.5" in hover and f"alignment: {value:.3f} ±" in hover and "(gain +" in hover
    assert "17 s / image" in hover and "dominated" in hover
    assert traces["RGG"]["marker"]["symbol"][1].endswith("-open")
    assert len(traces["DB-MPA"]["hovertext"]) == 5  # with the ends


def test_a_label_cannot_end_the_plots_script() -> None:
    half = preference(0.5, ("a</script>", "b"))
    frame = score_table(
        [(blend("base"), {name: 0.0 for name in half}), (blend("db-mpa", half), {name: 1.0 for name in half})], 3
    )
    (plot,) = pareto_plots(estimate(frame), list(half))
    assert plot.count("</script>") == 1


def test_every_file_is_written_and_returned_and_the_summary_has_a_row_per_blend(folder: Path) -> None:
    written = write_report(folder / "scores.parquet", folder, samples=50)
    assert written[0] == folder / "report.html" and all(file.is_file() for file in written)
    names = {str(file.relative_to(folder)) for file in written}
    assert {"summary.csv", "pareto.png", "pareto.svg", "gain_by_strength.svg", "tables/rewards.md",
            "tables/gains.tex", "tables/hypervolume.csv"} <= names  # fmt: skip
    table = pd.read_csv(folder / "summary.csv")
    assert table["blend"].tolist() == list(dict.fromkeys(evaluation()["blend"]))
    frame = evaluation()
    expected = frame[frame["blend"] == "rgg_0.5"]["reward/held"].mean()
    assert table.set_index("blend").loc["rgg_0.5", "reward/held"] == pytest.approx(expected, rel=1e-5)


def test_without_images_or_record_the_page_says_so(tmp_path: Path) -> None:
    frame = score_table([(blend("single", {"a": 1.0}), {"a": [[1.0, np.nan], [0.5, 0.7]]})], 2, 2)
    write_scores(tmp_path / "scores.parquet", frame, {})
    report_main([str(tmp_path / "scores.parquet"), "--out", str(tmp_path / "report"), "--samples", "50"])
    text = Page((tmp_path / "report" / "report.html").read_text(encoding="utf-8")).text
    assert "No images were found" in text and "holds no record" in text
    assert "A front needs two measured rewards" in text
    assert "no thumbnails" in text and "no base was evaluated" in text
    assert "a adapter: 1 of 4 images have no score of a" in text


def test_a_label_that_is_a_path_puts_no_other_file_into_the_page(tmp_path: Path) -> None:
    secret = tmp_path / "elsewhere" / "0-0.png"
    secret.parent.mkdir()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(secret)
    folder = tmp_path / "evaluation" / "images"
    (folder / "base").mkdir(parents=True)
    (folder / "linked").symlink_to(secret.parent)
    half = preference(0.5, ("a", "b"))
    for label in (str(secret.parent), "../../elsewhere", "linked"):
        blends = [(blend("base"), {"a": 0.0, "b": 0.0}), (blend("db-mpa", half, label), {"a": 1.0, "b": 1.0})]
        frame = score_table(blends, 1)
        assert image_grids(frame, estimate(frame), preference_sets(frame), [folder]) == []


def test_a_file_that_is_no_picture_of_a_browsers_is_left_out(tmp_path: Path) -> None:
    half = preference(0.5, ("a", "b"))
    frame = score_table([(blend("base"), {"a": 0.0, "b": 0.0}), (blend("db-mpa", half, "x"), {"a": 1.0, "b": 1.0})], 1)
    write_images(tmp_path, frame, prompts=1)
    whole = (tmp_path / "x" / "0-0.png").read_bytes()
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n"
    for content in (whole[: len(whole) // 2], postscript, b""):
        (tmp_path / "x" / "0-0.png").write_bytes(content)
        (grid,) = image_grids(frame, estimate(frame), preference_sets(frame), [tmp_path])
        assert [each.text for each in grid.prompts[0][1][0][1]] == ["Base", "unreadable"]


def test_the_first_section_is_the_verdict_and_no_raw_label_is_in_the_text(folder: Path, page: Page) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.index('id="verdict"') < text.index('id="run"')
    assert "DB-MPA loses to:" in page.text and "DB-MPA beats:" in page.text
    raw = [label for label in evaluation()["blend"].unique() if "_" in label]
    assert not [label for label in raw if label in page.text]


def test_text_of_a_score_file_stays_text_in_the_page(tmp_path: Path) -> None:
    bad = "<img src=x onerror=alert(1)>"
    half = preference(0.5, (bad, "b"))
    frame = score_table(
        [(blend("base"), {bad: 0.0, "b": 0.0}), (blend("single", {bad: 1.0}, adapter=bad), {bad: 1.0, "b": 1.0}),
         (blend("db-mpa", half, bad), {bad: [[1.0, np.nan], [1.0, 1.0]], "b": 1.0})], 2, 2,
    )  # fmt: skip
    frame["tag"], frame["prompt"] = bad, bad
    write_scores(tmp_path / "scores.parquet", frame, {"command": bad, "adapters": {bad: {"path": bad}}})
    write_report(tmp_path / "scores.parquet", tmp_path, samples=50)
    parsed = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not [image for image in parsed.all("img") if image.get("src") == "x" or "onerror" in image]
    assert bad in parsed.text


def test_categories_of_the_prompts_have_a_table(tmp_path: Path) -> None:
    frame = evaluation(prompts=8)
    frame["tag"] = np.where(frame["prompt_id"] < 4, "colors", "counting")
    write_scores(tmp_path / "scores.parquet", frame, RECORD)
    write_report(tmp_path / "scores.parquet", tmp_path, samples=50)
    text = (tmp_path / "tables" / "categories.md").read_text(encoding="utf-8")
    assert "colors (4 prompts), w = 0.5" in text
    assert "no category of the prompts" not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("mistake", ["out is a file", "out below a file", "images missing", "scores is a folder"])
def test_a_mistake_in_a_path_is_one_sentence_before_anything_is_written(
    tmp_path: Path, mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, file = tmp_path / "scores.parquet", tmp_path / "file"
    write_scores(scores, evaluation(prompts=2), RECORD)
    file.write_text("kept")
    command = {
        "out is a file": [str(scores), "--out", str(file)],
        "out below a file": [str(scores), "--out", str(file / "report")],
        "images missing": [str(scores), "--images", str(tmp_path / "nowhere")],
        "scores is a folder": [str(tmp_path)],
    }[mistake]
    with pytest.raises(SystemExit) as stopped:
        report_main(command)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and len(error.strip().splitlines()[-1]) < 400
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "scores.parquet"]
    assert file.read_text() == "kept"


def test_large_images_are_shrunk_and_the_grid_stops_where_the_page_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = preference(0.5, ("a", "b"))
    frame = score_table([(blend("base"), {"a": 0.0, "b": 0.0}), (blend("db-mpa", half), {"a": 1.0, "b": 1.0})], 4)
    write_images(tmp_path, frame, side=512, prompts=4)
    sizes = [len(image_uri(file)) for file in tmp_path.rglob("*.png")]
    assert max(sizes) < 30_000 < IMAGE_BYTES
    estimates, sets = estimate(frame), preference_sets(frame)
    assert len(image_grids(frame, estimates, sets, [tmp_path])[0].prompts) == 4
    # a prompt's row is two images; room for two and a half rows
    monkeypatch.setattr(report_parts, "IMAGE_BYTES", int(2.5 * 2 * np.mean(sizes) * 3 / 4))
    assert len(image_grids(frame, estimates, sets, [tmp_path])[0].prompts) == 2


# ── several files ────────────────────────────────────────────────────────────────────────────────────────────────────


def two_files(folder: Path, **changes: Any) -> list[Path]:
    """One evaluation in two files, the base in both; ``changes`` alter the second's record."""
    frame = evaluation(prompts=3)
    steered = frame["method"].isin(["code", "rgg"])
    parts = [frame[~steered], frame[steered | (frame["method"] == "base")]]
    paths = [folder / "one" / "scores.parquet", folder / "two" / "scores.parquet"]
    for path, part, record in zip(paths, parts, [RECORD, RECORD | {"command": "second"} | changes], strict=True):
        write_scores(path, part.drop(columns="thumbnail"), record)
    return paths


def test_score_tables_of_the_same_prompts_and_settings_are_put_together(tmp_path: Path) -> None:
    frame, record = read_all(two_files(tmp_path))
    whole = evaluation(prompts=3)
    assert sorted(frame["blend"].unique()) == sorted(whole["blend"].unique()) and len(frame) == len(whole)
    assert list(record["commands"].values()) == [RECORD["command"], "second"]
    orders = frame.drop_duplicates("blend").set_index("blend")["order"]
    assert orders.is_unique and orders["rgg_0.2"] > orders["morl_0.8"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eta": 0.0}, "eta is 1.0 in one and 0.0 in the other"),
        ({"base": "other"}, "base is 'miniature'"),
        ({"adapters": {"alignment": {"path": "runs/a", "sha256": "34"}}}, "adapter 'alignment' is not the same"),
    ],
)
def test_tables_made_with_other_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be merged: {re.escape(message)}"):
        read_all(two_files(tmp_path, **changes))


def test_tables_of_other_prompts_rewards_or_base_scores_are_refused(tmp_path: Path) -> None:
    paths = two_files(tmp_path)
    frame = pd.read_parquet(paths[1])
    wrong = {
        "images are in one of them only": frame[frame["prompt_id"] > 0],
        "one measures": frame.drop(columns="reward/held"),
        "blend 'base' has other scores": frame.assign(**{"reward/held": frame["reward/held"] + 0.1}),
    }
    for message, part in wrong.items():
        write_scores(paths[1], part, RECORD)
        with pytest.raises(ValueError, match=message):
            read_all(paths)


def test_the_command_ends_with_one_line_when_scores_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        report_main([str(tmp_path / "scores.parquet")])
    assert stopped.value.code == 2
    assert "there is no score table" in capsys.readouterr().err


def test_one_bootstrap_serves_the_report_the_summary_and_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(report, "estimate", lambda *given: calls.append(given) or estimate(*given))
    write_scores(tmp_path / "scores.parquet", evaluation(prompts=3), RECORD)
    write_report(tmp_path / "scores.parquet", tmp_path, samples=50, show=True)
    printed = capsys.readouterr().out
    assert len(calls) == 1
    assert "db-mpa_0.2" in printed and "DB-MPA beats: " in printed


def test_the_printed_summary_has_every_blend(capsys: pytest.CaptureFixture[str]) -> None:
    frame = evaluation(prompts=3)
    print_summary(frame)
    printed = capsys.readouterr().out
    assert all(label in printed for label in frame["blend"])


def test_without_the_extra_everything_but_the_page_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = tmp_path / "scores.parquet"
    write_scores(scores, evaluation(prompts=3), RECORD)
    files = {}
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setitem(sys.modules, "plotly", None)
        written = write_report(scores, tmp_path / name, samples=50, show=True)
        files[name] = {str(file.relative_to(tmp_path / name)) for file in written}
    assert files["with"] - files["without"] == {"report.html"} and len(files["without"]) > 20
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        report_main([str(tmp_path / "nowhere.parquet")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "plotly" in said and "pip install 'dblightning[report]'" in said and "nowhere" not in said


def test_a_markdown_table_is_as_wide_as_its_cells_and_a_row_one_line() -> None:
    assert pipe_table([["a", "1 ± 2"], ["long\nname", ""]], ["blend", "r"]) == (
        "| blend     | r     |\n|:----------|:------|\n| a         | 1 ± 2 |\n| long name |       |"
    )

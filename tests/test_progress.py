"""What a log that is not a terminal shows of a run."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from dblightning import progress
from dblightning.progress import Lines, duration, image_progress, quiet_libraries
from tests.toy_fit import data, module, trainer


def test_a_log_gets_a_line_per_rollout_and_per_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = module()
    given = trainer(tmp_path, enable_progress_bar=True, limit_val_batches=1.0, max_epochs=2)
    given.fit(run, datamodule=data(tmp_path))
    output = capsys.readouterr().out
    lines = re.findall(
        r"^rollout (\d+)/6  reward [+-][\d.e-]+  KL [\d.e-]+  images/s [\d.e+]+  ETA \d+ s$", output, re.M
    )
    assert lines == ["1", "2", "3", "4", "5", "6"]
    assert len(re.findall(r"^validation  val/reward [+-][\d.]+$", output, re.M)) == 3  # before the first rollout too
    assert output.startswith("validation")
    assert "\r" not in output  # no bar that redraws itself


def test_a_terminal_gets_lightnings_bar_and_no_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "on_a_terminal", lambda: True)
    trainer(tmp_path, enable_progress_bar=True).fit(module(), datamodule=data(tmp_path))
    captured = capsys.readouterr()
    assert "rollout 1/" not in captured.out
    assert "3/3" in captured.out + captured.err


def test_without_a_progress_bar_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path).fit(module(), datamodule=data(tmp_path))
    assert "rollout" not in capsys.readouterr().out


def test_images_are_counted_in_lines_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock under the test's hand: two seconds an image; those that were there already took none."""
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines = Lines(total=100, every=25)
    lines.update(40, made=False)
    for _ in range(60):
        clock[0] += 2
        lines.update(1)
    lines.close()
    assert capsys.readouterr().out.splitlines() == [
        "40/100 images",
        "50/100 images  0.5 images/s  ETA 1 min 40 s",
        "75/100 images  0.5 images/s  ETA 50 s",
        "100/100 images  0.5 images/s  ETA 0 s",
    ]
    assert isinstance(image_progress(10), Lines)
    assert not isinstance(image_progress(10, shown=False), Lines)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (200, "3 min 20 s"), (59.7, "1 min 00 s"), (7500, "2 h 05 min")]
)
def test_a_duration_is_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_advertisements_are_left_out_and_messages_about_the_run_stay(caplog: pytest.LogCaptureFixture) -> None:
    from lightning.pytorch.utilities import rank_zero_info

    quiet_libraries()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        rank_zero_info("💡 Tip: For seamless cloud logging and experiment tracking, try installing [litlogger]")
        rank_zero_info("GPU available: False, used: False")
        rank_zero_info("resuming from runs/quickstart/checkpoints/rollout-000010.ckpt")
    assert [record.getMessage()[:8] for record in caplog.records] == ["resuming"]

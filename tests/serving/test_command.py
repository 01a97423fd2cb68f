"""The commands' options, read before anything is loaded: without a server, and without the extra."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from dblightning.arguments import serve_parser, studio_parser
from dblightning.cli import main
from dblightning.serving.command import model_of, service_settings

#: of what a pipeline is loaded from → part of the sentence
WRONG_MODELS = {
    "--adapter x": "NAME=PATH",
    "--adapter x=/nowhere/at/all": "no file or folder",
    "--preset /nowhere.yaml": "no preset file",
}
WRONG = {
    "--host 0.0.0.0": "needs a token",
    "--port 80": "--port",
    "--adapter x=/nowhere/at/all": "no file or folder",
    "--timeout 0": "--timeout",
    "--devices many": "--devices",
    "--max-images 100": "--queue-limit",
}


@pytest.mark.parametrize("parser", [serve_parser, studio_parser])
@pytest.mark.parametrize("words", WRONG_MODELS)
def test_a_model_that_is_not_there_is_one_sentence(parser: Callable[[], argparse.ArgumentParser], words: str) -> None:
    with pytest.raises((ValueError, OSError), match=WRONG_MODELS[words]):
        model_of(parser().parse_args(words.split()))


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_command_line_is_one_sentence_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.delenv("DBLIGHTNING_TOKEN", raising=False)
    with pytest.raises((ValueError, OSError), match=WRONG[words]):
        service_settings(serve_parser().parse_args(words.split()))


def test_every_option_of_a_service_reaches_its_settings() -> None:
    words = "--dtype float16 --accelerator cpu --devices 2 --workers-per-device 3 --threads 4 --max-batch-size 5"
    words += " --batch-wait 1 --max-rows 6 --queue-limit 17 --timeout 9 --max-images 8 --max-size 99 --max-steps 10"
    settings = service_settings(serve_parser().parse_args([*words.split(), "--no-token"]))
    assert (settings.dtype, settings.accelerator, settings.devices) == ("float16", "cpu", 2)
    assert settings.workers_per_device == 3
    assert (settings.threads, settings.max_batch_size, settings.batch_wait, settings.max_rows) == (4, 5, 1.0, 6)
    assert (settings.queue_limit, settings.timeout, settings.read_timeout, settings.token) == (17, 9.0, 10.0, None)
    limits = settings.offer.limits
    assert (limits.max_images, limits.max_size, limits.max_steps, limits.max_kl_scale) == (8, 99, 10, 100.0)


def test_a_short_token_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBLIGHTNING_TOKEN", "hunter2")
    with pytest.raises(ValueError, match="16 printable") as error:
        service_settings(serve_parser().parse_args([]))
    assert "hunter2" not in str(error.value)


def test_without_the_extra_the_command_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "litserve", None)
    monkeypatch.delitem(sys.modules, "dblightning.serving.service", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'dblightning\[serve\]'"):
        main(["serve"])

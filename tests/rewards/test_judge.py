"""The judge against a chat endpoint of our own, whose answers are known."""

from __future__ import annotations

import base64
import io
import json
import math
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dblightning.rewards import ChatJudge, RewardUnavailable, build_reward
from tests.rewards.tiny import pictures

RUBRIC = "Caption: [{prompt}]. Rate from 1 to 5 after 'Final Score:'."
Answer = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


def text(content: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


def tokens(*steps: tuple[str, dict[str, float]]) -> dict[str, Any]:
    """An answer with probabilities: (token, alternative → probability) each."""
    content = [
        {
            "token": token,
            "logprob": math.log(top[token]),
            "top_logprobs": [{"token": name, "logprob": math.log(p)} for name, p in top.items()],
        }
        for token, top in steps
    ]
    answer = text("".join(token for token, _ in steps))
    answer["choices"][0]["logprobs"] = {"content": content}
    return answer


class Endpoint:
    """A chat endpoint; ``answer`` gets each request's body."""

    def __init__(self, answer: Answer, delay: float = 0.0) -> None:
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.most = self.now = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.seen.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.paths.append(self.path)
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                time.sleep(delay)
                status, content = answer(body)
                sent = json.dumps(content).encode()
                with lock:
                    outer.now -= 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@contextmanager
def serving(answer: Answer, delay: float = 0.0) -> Iterator[Endpoint]:
    endpoint = Endpoint(answer, delay)
    thread = threading.Thread(target=endpoint.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.server.shutdown()
        endpoint.server.server_close()
        thread.join()


def picture_in(body: dict[str, Any]) -> np.ndarray:
    (url,) = (part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url")
    prefix, _, data = url.partition(",")
    assert prefix == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def question_in(body: dict[str, Any]) -> str:
    return next(part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text")


def by_brightness(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """A judge that likes light pictures: 1 … 5."""
    return 200, text(f"It has 3 things. Final Score: {1 + 4 * picture_in(body).mean() / 255:.3f}")


def test_each_image_is_asked_about_with_its_prompt_and_the_number_is_mapped_to_0_1() -> None:
    images = pictures(6, 12, 20) * torch.linspace(0.2, 1, 6).view(-1, 1, 1, 1)
    prompts = [f"picture {i} with {{braces}}" for i in range(6)]
    with serving(by_brightness) as endpoint:
        reward = ChatJudge(endpoint.url, "judge-7b", RUBRIC, after="Final Score:", system="Be fair.")
        scores = reward.score(images, prompts)
        assert reward.requests == 6 and not reward.differentiable and reward.needs_prompt
        reward.update(images, prompts)
    torch.testing.assert_close(reward.compute(), scores.mean())
    expected = (images * 255).round().mean((1, 2, 3)) / 255
    torch.testing.assert_close(scores, expected, rtol=0, atol=5e-4)  # three decimals of four steps
    assert {question_in(body) for body in endpoint.seen} == {RUBRIC.replace("{prompt}", each) for each in prompts}
    body = endpoint.seen[0]
    assert endpoint.paths[0] == "/v1/chat/completions"
    assert body["model"] == "judge-7b" and body["temperature"] == 0 and "logprobs" not in body
    assert body["messages"][0] == {"role": "system", "content": "Be fair."}
    assert picture_in(body).shape == (12, 20, 3)


def test_token_probabilities_give_the_expected_level() -> None:
    levels = {"1": 0.1, "2": 0.2, "3": 0.3, "4": 0.25, " 4": 0.05, "five": 0.1}

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        assert body["logprobs"] is True and body["top_logprobs"] == 20
        return 200, tokens(("2", {"2": 1.0}), (" things. Final", {" things. Final": 1.0}), (" Score", {" Score": 0.9}),
                           (":", {":": 1.0}), ("3", levels))  # fmt: skip

    mean = (0.1 * 1 + 0.2 * 2 + 0.3 * 3 + 0.3 * 4) / 0.9
    with serving(answer) as endpoint:
        reward = ChatJudge(endpoint.url, "m", RUBRIC, read="tokens", after="Final Score:")
        assert reward.score(pictures(1), ["a"]).item() == pytest.approx((mean - 1) / 4, abs=1e-6)
        # without `after` the first level in the answer counts, a "2" that is certain
        reward = ChatJudge(endpoint.url, "m", RUBRIC, read="tokens")
        assert reward.score(pictures(1), ["a"]).item() == pytest.approx(0.25)


def test_words_are_levels_too_and_an_answer_that_is_mostly_something_else_has_no_score() -> None:
    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, tokens((" Yes", {" Yes": share, "▁no": 0.3 * share, "Perhaps": 1 - 1.3 * share}))

    share = 0.6
    with serving(answer) as endpoint:
        options: dict[str, Any] = {"read": "tokens", "levels": {"yes": 1, "No": 0}, "scale": (0, 1)}
        reward = ChatJudge(endpoint.url, "m", 'Does this show "{prompt}"? Yes or no.', **options)
        assert reward.score(pictures(1), ["a"]).item() == pytest.approx(1 / 1.3, abs=1e-6)
        share = 0.1
        with pytest.raises(RuntimeError, match="no score can be read from the answer ' Yes'"):
            reward.score(pictures(1), ["b"])
        reward.unreadable = 0.25
        assert reward.score(pictures(1), ["b"]).item() == 0.25


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("Final Score: 4", 0.75),
        ("Final Score: 9", 1.0),
        ("Final Score: -3", 0.0),
        ("4", None),
        ("Final Score: good", None),
    ],
)
def test_numbers_are_read_after_the_marker_and_kept_in_the_scale(content: str, value: float | None) -> None:
    with serving(lambda body: (200, text(content))) as endpoint:
        reward = ChatJudge(endpoint.url, "m", RUBRIC, after="Final Score:")
        if value is None:
            with pytest.raises(RuntimeError, match="no score can be read"):
                reward.score(pictures(1), ["a"])
        else:
            assert reward.score(pictures(1), ["a"]).item() == value


def test_answers_are_kept_by_image_prompt_and_rubric(tmp_path: Path) -> None:
    images, prompts = pictures(3), ["a", "b", "c"]
    with serving(by_brightness) as endpoint:

        def judge(rubric: str = RUBRIC, **options: Any) -> ChatJudge:
            return ChatJudge(endpoint.url, "m", rubric, after="Final Score:", cache=tmp_path, **options)

        first = judge().score(images, prompts)
        assert len(endpoint.seen) == 3
        again = judge()  # another object, as another rank or a resumed run has
        torch.testing.assert_close(again.score(images, prompts), first, rtol=0, atol=0)
        assert len(endpoint.seen) == 3 and again.requests == 0
        judge(unreadable=0.0, concurrency=1).score(images, prompts)  # how an answer is read is not part of the question
        assert len(endpoint.seen) == 3
        judge().score(images, ["a", "b", "x"])
        assert len(endpoint.seen) == 4
        judge().score((images + 0.01).clamp(0, 1), prompts)
        assert len(endpoint.seen) == 7
        judge(RUBRIC + " Be strict.").score(images, prompts)
        assert len(endpoint.seen) == 10
        judge(temperature=0.5).score(images, prompts)
        assert len(endpoint.seen) == 13
    next(tmp_path.rglob("*.json")).write_text("{half")  # a killed disk's file is asked again, not believed
    with serving(by_brightness) as other:
        judge = ChatJudge(other.url, "m", RUBRIC, after="Final Score:", cache=tmp_path)  # type: ignore[assignment]
        judge.score(images, prompts)  # type: ignore[attr-defined]
        assert len(other.seen) <= 1


def test_equal_images_of_equal_prompts_are_asked_about_once() -> None:
    images = pictures(1).expand(5, -1, -1, -1)
    with serving(by_brightness) as endpoint:
        scores = ChatJudge(endpoint.url, "m", RUBRIC, after="Final Score:").score(images, ["a", "a", "b", "a", "b"])
    assert len(endpoint.seen) == 2 and scores.unique().numel() == 1


def test_requests_run_side_by_side_up_to_the_limit() -> None:
    images = pictures(12)
    with serving(by_brightness, delay=0.15) as endpoint:
        ChatJudge(endpoint.url, "m", RUBRIC, after="Final Score:", concurrency=4).score(images, list("abcdefghijkl"))
    assert 2 <= endpoint.most <= 4


def test_one_failure_ends_the_others_tries() -> None:
    """Seven are asked to wait, the eighth is refused: the error comes now, not after everyone's patience."""

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return (404, {"error": "no"}) if "[h]" in question_in(body) else (503, {"error": "busy"})

    with serving(answer) as endpoint:
        with pytest.raises(RuntimeError, match="status 404"):
            ChatJudge(endpoint.url, "m", RUBRIC, network={"backoff": 300}).score(pictures(8), list("abcdefgh"))
        # nobody's second try came, which the first waits minutes for; the test's own time limit says that nobody waited
        assert len(endpoint.seen) <= 8


def test_the_budget_stops_the_run_as_a_lost_server_does(tmp_path: Path) -> None:
    with serving(by_brightness) as endpoint:
        reward = ChatJudge(endpoint.url, "m", RUBRIC, after="Final Score:", max_requests=4, cache=tmp_path)
        reward.score(pictures(3), list("abc"))
        with pytest.raises(RewardUnavailable, match="the budget of max_requests=4 is spent"):
            reward.score(pictures(5), list("defgh"))
        assert reward.requests == 4 >= len(endpoint.seen)  # the fourth may be on its way
        reward.score(pictures(3), list("abc"))  # what is known costs nothing


def test_a_busy_endpoint_is_asked_again_a_refusal_is_not_and_the_token_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    count = 0

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        nonlocal count
        count += 1
        return (429, {"error": {"message": "slow down"}}) if count < 3 else by_brightness(body)

    network = {"backoff": 0.01, "token_env": "JUDGE_TOKEN"}
    with serving(answer) as endpoint:
        reward = ChatJudge(endpoint.url, "m", RUBRIC, after="Final Score:", network=network)
        assert 0 <= reward.score(pictures(1), ["a"]).item() <= 1
        assert count == 3 == reward.requests  # the budget counts tries
        assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    with serving(lambda body: (404, {"error": "no model m"})) as endpoint:
        with pytest.raises(RuntimeError, match="/v1/chat/completions answered status 404: no model m"):
            ChatJudge(endpoint.url, "m", RUBRIC, network={"backoff": 0.01}).score(pictures(1), ["a"])
        assert len(endpoint.seen) == 1


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{"message": None}]}, [1]])
def test_an_answer_of_another_shape_is_refused(answer: Any) -> None:
    with (
        serving(lambda body: (200, answer)) as endpoint,
        pytest.raises(RuntimeError, match="as OpenAI's chat endpoint"),
    ):
        ChatJudge(endpoint.url, "m", RUBRIC).score(pictures(1), ["a"])


def test_an_endpoint_without_probabilities_is_named() -> None:
    with (
        serving(lambda body: (200, text("4"))) as endpoint,
        pytest.raises(RuntimeError, match="read='number' needs no probabilities"),
    ):
        ChatJudge(endpoint.url, "m", RUBRIC, read="tokens").score(pictures(1), ["a"])


def test_images_are_sent_at_the_size_requested() -> None:
    with serving(by_brightness) as endpoint:
        ChatJudge(endpoint.url, "m", RUBRIC, after="Final Score:", image_size=32).score(pictures(1, 16, 64), ["a"])
    assert picture_in(endpoint.seen[0]).shape == (8, 32, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"read": "mind"}, "read must be 'number' or 'tokens'"),
        ({"scale": (5, 1)}, "scale must be two numbers"),
        ({"unreadable": 2.0}, "unreadable must lie in"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"max_requests": 0}, "max_requests must be at least 1"),
        ({"pattern": r"\d+"}, "needs a group around the number"),
        ({"levels": {"a": 1.0, " A": 2.0}, "read": "tokens"}, "two different tokens"),
        ({"network": {"speed": 1}}, "network has no setting 'speed'"),
        ({"least_mass": -1}, "least_mass must lie in"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatJudge("http://localhost:1/v1", "m", RUBRIC, **options)


def test_it_is_built_by_name_and_survives_pickling() -> None:
    reward = build_reward("judge", url="http://localhost:1/v1", model="m", rubric=RUBRIC, reward_name="mine")
    copied = pickle.loads(pickle.dumps(reward))
    assert isinstance(copied, ChatJudge) and copied.name == "mine" and copied.rubric == RUBRIC


@pytest.mark.parametrize(("recipe", "answer", "value"), [
    ("unified_reward", text("Both are fine. Final Score: 4"), 0.8),  # Flow-GRPO's division by 5
    ("unified_reward", text("I cannot say."), 0.0),
    ("qwen_vl", tokens(("4", {"4": 0.5, "5": 0.5})), 0.875),
])  # fmt: skip
def test_the_recipes_read_their_models_answers(
    tmp_path: Path, recipe: str, answer: dict[str, Any], value: float
) -> None:
    config = yaml.safe_load((Path(__file__).parents[2] / f"configs/sd15/{recipe}.yaml").read_text())
    arguments = config["model"]["reward"]["init_args"]
    with serving(lambda body: (200, answer)) as endpoint:
        reward = ChatJudge(**{**arguments, "url": endpoint.url, "cache": tmp_path})
        assert reward.score(pictures(1), ["a red car"]).item() == pytest.approx(value)
    assert "a red car" in question_in(endpoint.seen[0]) and "{" not in question_in(endpoint.seen[0])


def test_the_recipe_for_hpsv3_on_the_docs_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="the reward server's extra is not installed")
    from dblightning.rewards import RemoteReward
    from dblightning.rewards.server import make_server
    from tests.rewards.test_remote import serving as serving_scores

    class Inferencer:
        """What the recipe calls of the hpsv3 package: (mu, sigma) of each image, mu its brightness."""

        def __init__(self, device: str) -> None:
            assert device == "cuda"

        def reward(self, prompts: list[str], image_paths: list[str]) -> torch.Tensor:
            assert len(prompts) == len(image_paths)
            return torch.tensor([[np.asarray(Image.open(path)).mean() / 255, 0.1] for path in image_paths])

    monkeypatch.setitem(sys.modules, "hpsv3", SimpleNamespace(HPSv3RewardInferencer=Inferencer))
    page = (Path(__file__).parents[2] / "docs/rewards.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "hpsv3" in block)
    found: dict[str, Any] = {}
    exec(code, found)
    images = pictures(3)
    with serving_scores(make_server(found["score"], port=0)) as url:
        scores = RemoteReward(url, reward_name="hpsv3").score(images, list("abc"))
    torch.testing.assert_close(scores, (images * 255).round().mean((1, 2, 3)) / 255, rtol=0, atol=1e-5)

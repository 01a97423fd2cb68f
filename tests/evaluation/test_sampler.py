"""What the record says of a base model and of rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dblightning.backbone import DiffusersBackbone
from dblightning.evaluation.sampler import describe, made_with
from dblightning.rewards import JPEGCompressibility, WeightedReward
from tests.conftest import randomize
from tests.toy_rewards import LinearReward


def test_the_base_is_known_by_its_weights_whatever_adapters_it_carries(sd15_folder: Path) -> None:
    backbone = DiffusersBackbone(str(sd15_folder))
    before = made_with(backbone, {})
    backbone.adapters.add("a", seed=0)
    randomize(backbone.adapters, "a", 1)
    assert made_with(backbone, {}) == before == json.loads(json.dumps(before))
    for part in (backbone.unet, backbone.vae, backbone.text_encoder):
        weights = [each for name, each in part.named_parameters() if ".lora_" not in name]
        largest = max(weights, key=torch.numel)
        with torch.no_grad():
            largest.mul_(1.01)
        changed = made_with(backbone, {})
        assert changed["base_weights"] != before["base_weights"]
        with torch.no_grad():
            largest.copy_(largest / 1.01)
        before = made_with(backbone, {})


def test_a_reward_is_known_by_class_settings_weights_and_what_it_is_made_of() -> None:
    def weighted(quality: int, weight: float) -> Any:
        parts: Any = {"size": JPEGCompressibility(quality=quality), "sum": LinearReward(2.0)}
        return describe(WeightedReward(parts, {"size": weight, "sum": 1 - weight}))

    described = weighted(90, 0.25)
    assert described == weighted(90, 0.25) == json.loads(json.dumps(described))
    assert described["weights"] == {"size": 0.25, "sum": 0.75}
    assert described != weighted(80, 0.25) != weighted(80, 0.5)
    learned = LinearReward()
    learned.head = torch.nn.Linear(4, 1)
    before = describe(learned)
    with torch.no_grad():
        learned.head.weight.add_(1.0)
    assert describe(learned) != before
    learned.samples = {f"prompt {i}": {"count": 1} for i in range(1000)}  # type: ignore[assignment]
    long = describe(learned)["samples"]
    assert len(long) < 100
    learned.samples["prompt 3"] = {"count": 2}  # type: ignore[index, operator]
    assert describe(learned)["samples"] != long


def test_a_servers_token_is_not_written_down() -> None:
    reward: Any = LinearReward()
    reward.url, reward.headers = "http://127.0.0.1:1", {"Authorization": "Bearer secret"}  # as RemoteReward has them
    assert describe(reward)["url"] == "http://127.0.0.1:1"
    assert "secret" not in json.dumps(describe(reward))

"""CPU seconds of a basis trained in one run, against its adapters trained in runs one after the other.

    python benchmarks/basis.py --json benchmarks/results/basis.json
    python benchmarks/basis.py --tiny

Both sides are whole commands, ``python -m dblightning fit`` with the start of Python, a validation before and after,
and the export. The basis is ``configs/miniature/basis_policy_gradient.yaml`` for so many rollouts; each single run is
that file with one adapter's reward and settings, and the same seed. Runs are interleaved, one thread each. The table
says how far the adapters of the two sides are apart, too. A second table has one update pass alone, forward and
backward, three adapters' rows together against one adapter's three times over: what is left of the gain in a long run.
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml
from safetensors.torch import load_file

from benchmarks import machine
from benchmarks.publish import header, opening, parsed, publish

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "miniature" / "basis_policy_gradient.yaml"
#: name → settings of the update; the first are the config's own
SETTINGS: dict[str, dict[str, Any]] = {
    "the config's micro-batch": {},
    "micro-batch 8": {"batch_size": 8, "accumulation": 12},
    "the paper's micro-batch, 2": {"batch_size": 2, "accumulation": 12, "policy_steps": 5},
}


def basis_config(options: argparse.Namespace, update: dict[str, Any], out: Path) -> dict[str, Any]:
    """The config, shortened, without pictures and blends."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    export = {"class_path": "dblightning.callbacks.ExportAdapter", "init_args": {"folder": str(out / "adapters")}}
    config["trainer"] |= {
        "max_epochs": 1, "check_val_every_n_epoch": 1, "logger": False, "callbacks": [export],
        "enable_checkpointing": False, "default_root_dir": str(out), "enable_progress_bar": False,
    }  # fmt: skip
    config["model"]["optimisation"] |= update
    config["data"]["init_args"] |= {
        "rollouts_per_epoch": options.rollouts, "batch_size": options.images, "limit_val_prompts": options.validation,
    }  # fmt: skip
    return config


def single_config(basis: dict[str, Any], name: str, out: Path) -> dict[str, Any]:
    """The run of one adapter of a basis alone."""
    config = copy.deepcopy(basis)
    own = config["model"].pop("adapters")[name]
    config["model"]["reward"] = own.pop("reward")
    config["model"]["adapter"]["name"] = name
    for setting, value in own.items():
        group = "kl" if setting.startswith("kl_") else "optimisation"
        config["model"][group][setting.removeprefix("kl_")] = value
    config["trainer"]["callbacks"][0]["init_args"]["folder"] = str(out / "adapters" / name)
    return config


def cpu_seconds(config: dict[str, Any], folder: Path) -> tuple[float, float]:
    """CPU and wall seconds of the command that runs a config."""
    file = folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "dblightning", "fit", "--config", str(file), "--overwrite"],
        check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, time.perf_counter() - start


def distance(one: Path, other: Path) -> float:
    """Norm of the difference of two exported adapters over the norm of the second."""
    file = "pytorch_lora_weights.safetensors"
    first, second = load_file(one / file), load_file(other / file)
    apart = sum(float((first[key] - second[key]).square().sum()) for key in second)
    return float((apart / sum(float(each.square().sum()) for each in second.values())) ** 0.5)


def measure(options: argparse.Namespace, update: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Both sides, as often as wanted, in turns."""
    together, apart = [], []
    names: list[str] = []
    for repeat in range(options.repeats):
        out = folder / str(repeat)
        basis = basis_config(options, update, out / "basis")
        names = list(basis["model"]["adapters"])
        together.append(cpu_seconds(basis, out / "basis"))
        runs = [cpu_seconds(single_config(basis, name, out / "single"), out / "single" / name) for name in names]
        apart.append([sum(each) for each in zip(*runs, strict=True)])
    ratios = [one[0] / other[0] for one, other in zip(together, apart, strict=True)]
    last = folder / str(options.repeats - 1)
    return {
        "adapters": names,
        "basis_cpu_s": [each[0] for each in together],
        "runs_cpu_s": [each[0] for each in apart],
        "ratio": statistics.mean(ratios),
        "ratios": ratios,
        "distance": max(
            distance(last / "basis" / "adapters" / name, last / "single" / "adapters" / name) for name in names
        ),
    }


def passes(per_adapter: list[int], repeats: int = 3) -> dict[int, list[float]]:
    """CPU seconds of an update pass of three adapters, over three times one adapter's, by rows of each adapter."""
    import torch

    from dblightning.backbone import DiffusersBackbone

    torch.set_num_threads(1)
    backbone, names = DiffusersBackbone("miniature"), ["a", "b", "c"]
    for name in names:
        backbone.adapters.add(name, rank=4, seed=0)
    backbone.adapters.train_only(names)

    def seconds(rows: int, own: list[str]) -> float:
        latents = torch.randn(rows * len(own), *backbone.latent_shape)
        conditioning = backbone.encode(["a red circle"] * len(latents))
        gates = torch.eye(len(own)).repeat_interleave(rows, 0)
        timesteps, times = torch.full((len(latents),), 500), max(1, 48 // rows)
        start = time.process_time()
        for _ in range(times):
            backbone.denoise(latents, timesteps, conditioning, 3.0, gates=gates).square().mean().backward()
        return (time.process_time() - start) / times

    found: dict[int, list[float]] = {}
    for _ in range(repeats + 1):
        for rows in per_adapter:
            together = seconds(rows, names)
            with backbone.adapters.only(names[:1]):
                found.setdefault(rows, []).append(together / (3 * seconds(rows, names[:1])))
    return {rows: ratios[1:] for rows, ratios in found.items()}  # the first warms up


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    options = record["options"]
    conditions = (
        f"{options['rollouts']} rollouts of {options['images']} images per adapter, {options['validation']} validation "
        f"images per adapter before and after, {options['repeats']} repeats, one thread."
    )
    lines = opening(
        conditions, record, "update", "one run of three, CPU s", "three runs, CPU s", "ratio", "adapters apart by"
    )
    for name, each in record["results"].items():
        one, runs = (statistics.mean(each[key]) for key in ("basis_cpu_s", "runs_cpu_s"))
        spread = f" ({min(each['ratios']):.2f}–{max(each['ratios']):.2f})" if len(each["ratios"]) > 1 else ""
        lines.append(f"| {name} | {one:.0f} | {runs:.0f} | **{each['ratio']:.2f}**{spread} | {each['distance']:.1e} |")
    lines += ["", *header("transitions of each adapter in a pass", "three together, over three apart")]
    for rows, ratios in record["passes"].items():
        lines.append(f"| {rows} | {statistics.mean(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=5)
    parser.add_argument("--images", type=int, default=48, help="per adapter and rollout")
    parser.add_argument("--validation", type=int, default=32, help="prompts validated on, before and after")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = parsed(parser, tiny="see that it runs")
    if options.tiny:
        options.rollouts, options.images, options.validation, options.repeats = 1, 8, 2, 1
        options.only = ["the paper's micro-batch, 2"]
    record: dict[str, Any] = {
        "options": {name: getattr(options, name) for name in ("rollouts", "images", "validation", "repeats")},
        "machine": machine.describe(),
        "results": {},
        "passes": passes([2] if options.tiny else [2, 8, 32, 96], 1 if options.tiny else 3),
    }
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(options.only):
            record["results"][name] = measure(options, SETTINGS[name], Path(folder) / str(index))
            publish(record, table(record), options.json)  # as far as it has come


if __name__ == "__main__":
    main()

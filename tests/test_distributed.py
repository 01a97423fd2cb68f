from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def test_two_ranks_roll_out_different_images_and_keep_one_adapter(sd15_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\na green ring\na pink cross\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "distributed_fit.py"), str(sd15_folder), str(prompts), str(tmp_path)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, timeout=300,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["images"] == second["images"] == 8
    # the gradients were averaged, so the trained tensors are the same to the last bit
    for key, tensor in first["trained"].items():
        assert torch.equal(tensor, second["trained"][key]), key
    # and each rank sampled prompts and noise of its own
    images = torch.cat([each["replay"]["latents"][:, 0] for each in (first, second)]).flatten(1)
    assert len(torch.unique(images, dim=0)) == len(images) == 8

"""The learner on CUDA, in process: the same numbers as on the CPU."""

from __future__ import annotations

import sys

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_gradient_on_cuda_is_the_gradient_on_cpu(
    tiny_model, tmp_path, dtype, tolerance, zero_stage
):
    """Each device in its own interpreter: a process group belongs to one of them."""
    import subprocess

    import torch

    norms = {}
    for device in ("cpu", "cuda"):
        code = f"""
import sys; sys.path[:0] = {sys.path!r}
from test_learner import ALGORITHM, COEFS, make_batch
from plait.engine.config import LearnerConfig
from plait.engine.learner import LearnerWorker, Rank
import torch
config = LearnerConfig(device={device!r}, dtype={dtype!r}, zero_stage={zero_stage})
worker = LearnerWorker({str(tiny_model)!r}, config, ALGORITHM.losses, ALGORITHM.needs, Rank())
report, gradients = worker.gradients([make_batch()], "main", COEFS)
torch.save({{name: g.float().cpu() for name, g in gradients.items()}}, {str(tmp_path / device)!r})
"""
        subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
        norms[device] = torch.load(tmp_path / device, weights_only=True)
    for name, gradient in norms["cpu"].items():
        scale = gradient.abs().max()
        assert (norms["cuda"][name] - gradient).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("weight_sync", ["nccl", "ipc"])
def test_rollouts_on_cuda_serve_the_learners_weights(tiny_model, tmp_path, weight_sync):
    """A short run; every sync is proved or the run stops."""
    import json

    import torch

    from end_to_end.command_line import plait, tiny_recipe, write_recipe

    if weight_sync == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("nccl between learner and rollouts needs two GPUs")
    rows = [{"prompt": f"{i}?", "answer": str(i), "demonstration": str(i)} for i in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_recipe(
        tiny_model,
        rollouts={"device": "cuda", "weight_sync": weight_sync, "gpu_memory_utilization": 0.3},
        learner={"device": "cuda", "zero_stage": 1, "dtype": "bfloat16"},
    )
    plait(tmp_path, "train", write_recipe(tmp_path, "gpu.yaml", recipe), timeout=900)
    summary = json.loads((tmp_path / "runs" / "gpu" / "summary.json").read_text())
    assert summary["weight_sync"] == {"proved": 4, "failed": 0}

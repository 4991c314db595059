"""How the vLLM processes of one rollout worker are configured, and what they say when they fail."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from .config import RolloutConfig

ACTOR_PID = "PLAIT_ACTOR_PID"
"""Environment variable by which vLLM's processes know whose death ends them (see weight_transfer.py)."""

MIN_BATCHED_TOKENS = 4096
"""Prompt tokens of one engine step: enough to keep the cores busy, whatever the length limit."""

_TAIL_BYTES = 64 * 1024


def max_model_len(config: RolloutConfig) -> int:
    """Tokens of one sequence: prompt and response."""
    return config.max_prompt_length + config.max_response_length


def environment(config: RolloutConfig) -> dict[str, str]:
    """Environment of the worker's process at its start; vLLM's processes inherit it."""
    env = {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.device == "cpu":
        # Ray would set OMP_NUM_THREADS from the CPUs that the actor claims, which are none. The malloc settings keep
        # glibc from giving large buffers back to the system after every step; it reads them at process start.
        env |= {
            "OMP_NUM_THREADS": str(config.num_cpus),
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": str(64 * 2**30),
            "MALLOC_TOP_PAD_": str(256 * 2**20),
        }
    if config.weight_sync == "ipc":
        # CUDA IPC handles are Python objects on their way from the actor to its own vLLM processes.
        env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    return env


def engine_args(model_path: str, config: RolloutConfig, dtype: str) -> dict[str, Any]:
    """Arguments of vLLM's AsyncEngineArgs."""
    args: dict[str, Any] = {
        "model": model_path,
        "dtype": dtype,
        "load_format": "safetensors",  # the other format is a pickle
        "max_model_len": max_model_len(config),
        "max_num_seqs": config.max_num_seqs,
        "enforce_eager": config.enforce_eager,
        "enable_prefix_caching": True,
        # A prompt is computed in one piece. In pieces, vLLM rewinds the sample's generator after each, which CPU
        # generators do not support and which would make a seeded sample depend on what runs beside it.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_len(config), MIN_BATCHED_TOKENS),
        # The true behaviour log-probs under temperature and top_p; equal to the raw ones at 1.
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": f"{__package__}.weight_transfer.WeightSyncExtension",
        "disable_log_stats": True,
    }
    if config.device == "cpu":
        # In the EngineCore process itself: threads are set by the environment (above), and a further process
        # that pins them to cores, vLLM's default, would fight with the learner's.
        args["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
        # Prefixes are shared in whole blocks, and the kernels want multiples of 32; vLLM's default is 128.
        args["block_size"] = 32
        args["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
    else:
        args["distributed_executor_backend"] = "mp" if config.tensor_parallel_size > 1 else "uni"
        args["tensor_parallel_size"] = config.tensor_parallel_size
        args["gpu_memory_utilization"] = config.gpu_memory_utilization
    backend = (
        config.weight_sync
        if config.weight_sync == "shared_memory"
        else f"plait_{config.weight_sync}"
    )
    args["weight_transfer_config"] = {"backend": backend}
    return args


class EngineLog:
    """What vLLM's processes print, kept in an unnamed file: their exceptions only say "see root cause above"."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the engine)

    @contextlib.contextmanager
    def captured(self) -> Iterator[None]:
        """Send file descriptors 1 and 2 here; processes started meanwhile keep it as theirs."""
        saved = [os.dup(1), os.dup(2)]
        try:
            os.dup2(self._file.fileno(), 1)
            os.dup2(self._file.fileno(), 2)
            yield
        finally:
            for target, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, target)
                os.close(copy)

    def cause(self) -> str:
        """The last exception printed, as "Type: message"; "" if there is none."""
        end = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, end - _TAIL_BYTES))
        text = self._file.read().decode(errors="replace")
        causes = re.findall(
            r"(?:^|[\s:])((?:\w+\.)*\w+(?:Error|Exception): .+)$", text, re.MULTILINE
        )
        causes = [cause for cause in causes if "See root cause above" not in cause]
        return causes[-1].strip() if causes else ""

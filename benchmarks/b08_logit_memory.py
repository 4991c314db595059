"""B8: memory and time of log-probs and their gradient, against the whole logits at once.

Memory: peak of the resident set above what was resident before, in a fresh process for each number of tokens; the
figure is the slope over tokens x vocabulary. These processes have the allocator's defaults, which give every large
tensor back at once: elsewhere memory is kept, and the peak would tell how it is fragmented.
Time: forward and backward, at the width and vocabulary of SmolLM2.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from figures import at_most
from harness import Session, Side, Work, cost
from plait.engine.batch import from_sequences
from plait.engine.config import LearnerConfig
from plait.engine.model import PolicyModel, load_model
from plait.launch.cluster import ALLOCATOR
from shapes import LOW, VOCABULARY
from tiny_model import make_tiny_model

TOKENS = (1024, 2048, 3072, 4096)
ROWS = 4
CONFIG = LearnerConfig()


def sequences(tokens: int) -> list[list[int]]:
    rng = np.random.default_rng(tokens)
    return rng.integers(LOW, VOCABULARY, (ROWS, tokens // ROWS)).tolist()


def load_ours(folder: Path) -> PolicyModel:
    model = load_model(str(folder), CONFIG)
    return PolicyModel(model, packing=True, logit_chunk_tokens=CONFIG.logit_chunk_tokens)


def load_naive(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def ours(policy: PolicyModel, rows: list[list[int]]) -> torch.Tensor:
    """Mean log-prob of all tokens but the first of each row."""
    policy.hidden_grads.clear()
    return policy(from_sequences(rows)).logprobs.sum() / count(rows)


def naive(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """The same from the logits of all tokens."""
    ids = torch.tensor(rows)
    logprobs = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return logprobs.gather(-1, ids[:, 1:, None]).sum() / count(rows)


def count(rows: list[list[int]]) -> int:
    return sum(len(row) - 1 for row in rows)


WAYS = {"ours": (load_ours, ours), "naive": (load_naive, naive)}


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_bytes(way: str, folder: Path, tokens: int) -> int:
    """Of one forward and backward pass, above what was resident; in a process of its own."""
    torch.set_num_threads(2)
    load, mean_logprob = WAYS[way]
    model = load(folder)
    mean_logprob(model, sequences(8 * ROWS)).backward()  # gradients and workspaces exist
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    mean_logprob(model, sequences(tokens)).backward()
    return resident("VmHWM") - before


def measure(session: Session) -> None:
    with TemporaryDirectory() as folder:
        measure_memory(session, Path(folder) / "narrow")
        measure_time(session, Path(folder) / "wide")


def measure_memory(session: Session, folder: Path) -> None:
    # A narrow body: what grows with tokens x vocabulary is the logits.
    make_tiny_model(folder, vocab_size=VOCABULARY, layers=1)
    tokens = TOKENS[:2] if session.quick else TOKENS
    for name in ALLOCATOR:
        os.environ.pop(name, None)  # read at the start of a process: this one keeps them
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["b08_logit_memory"])
    ratios, slopes = [], {}
    with context.Pool(1, maxtasksperchild=1) as fresh:
        for _ in range(1 if session.quick else 5):
            for way in WAYS:
                calls = [(way, folder, n) for n in tokens]
                peaks = fresh.starmap(peak_bytes, calls, chunksize=1)
                slopes[way] = np.polyfit([n * VOCABULARY for n in tokens], peaks, 1)[0]
            ratios.append(slopes["ours"] / slopes["naive"])
    note = f"bytes a token and vocabulary entry: {slopes['ours']:.2f}, naive {slopes['naive']:.2f}"
    session.derive("slope of peak memory, ours / naive", ratios, target=at_most(0.1), note=note)


def measure_time(session: Session, folder: Path) -> None:
    make_tiny_model(folder, vocab_size=49_152, hidden=576, heads=9, kv_heads=3, layers=1)
    rows = sequences(512)
    models = {way: load(folder) for way, (load, _) in WAYS.items()}

    def side(way: str) -> Side:
        def run(number: int) -> None:
            models[way].zero_grad()
            WAYS[way][1](models[way], rows).backward()

        return Side(way, run, lambda given, result: Work.of(rows))

    session.compare(
        "time of forward and backward, ours / naive",
        side("naive"),
        side("ours"),
        target=at_most(1.05),
        value=cost,
        seconds=100,
        note="512 tokens, all of them trained; one layer of width 576, vocabulary 49152, float32",
    )
    session.count(
        "largest difference of a gradient, ours against naive",
        difference(models["ours"].model, models["naive"]),
        target=at_most(1e-6),
        note="of the mean log-prob, float32",
    )


def difference(one: Any, other: Any) -> float:
    theirs = dict(other.named_parameters())
    return max(
        float((p.grad - theirs[name].grad).abs().max()) for name, p in one.named_parameters()
    )

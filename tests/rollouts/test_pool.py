"""The pool on two real vLLM workers that serve a tiny model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plait.engine.errors import RolloutError
from plait.engine.processes import all_gone, family
from plait.engine.types import Prompt, Rollout, RolloutRequest, Sampling
from plait.rollouts.engine_process import MIN_BATCHED_TOKENS
from plait.rollouts.pool import Pool
from plait.rollouts.worker import sample_seed
from weight_sync.served_model import CONFIG, PROMPT, LocalLearner, request, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), "llama", tied=True)


@pytest.fixture(scope="module")
def pool(ray_session, model: str) -> Iterator[Pool]:
    opened = Pool(model, CONFIG.model_copy(update={"num_workers": 2}), dtype="float32", seed=11)
    opened.wait_started()
    yield opened
    opened.close()


def by_index(rollouts: Iterator[Rollout]) -> dict[tuple[str, int], Rollout]:
    found: dict[tuple[str, int], Rollout] = {}
    for rollout in rollouts:
        assert (rollout.prompt_id, rollout.index) not in found
        found[rollout.prompt_id, rollout.index] = rollout
    return found


def requests() -> list[RolloutRequest]:
    """40 samples: more than two workers take at once (2 x 2 x 8)."""
    prompts = [Prompt(f"p/{i}", (), tuple(range(i + 3, i + 13))) for i in range(10)]
    return [RolloutRequest(prompt, 4, Sampling(16)) for prompt in prompts]


def test_samples_do_not_depend_on_the_worker(pool: Pool, monkeypatch) -> None:
    both = by_index(pool.generate(requests(), step=3))
    assert len(both) == 40
    first = pool._serving()[:1]
    monkeypatch.setattr(pool, "_serving", lambda: first)
    one = by_index(pool.generate(requests(), step=3))
    assert {key: rollout.token_ids for key, rollout in one.items()} == {
        key: rollout.token_ids for key, rollout in both.items()
    }
    assert len({rollout.token_ids for rollout in one.values()}) == 40


def test_steps_and_runs_draw_different_samples(pool: Pool) -> None:
    (first,) = pool.generate([request(1)], step=0)
    (again,) = pool.generate([request(1)], step=0)
    (later,) = pool.generate([request(1)], step=1)
    assert first == again
    assert first.token_ids != later.token_ids
    seeds = {
        sample_seed(run, step, "p", i) for run in range(3) for step in range(3) for i in range(3)
    }
    assert len(seeds) == 27
    # Pinned: a resumed run on another machine must draw the same samples.
    assert sample_seed(0, 0, "sums/0", 0) == 5036899311549285209


def test_forced_prefix(pool: Pool, model: str) -> None:
    prefix = (40, 41, 42)
    rollouts = list(pool.generate([request(4, prefix=prefix)], step=0))
    plain = by_index(pool.generate([request(4)], step=0))
    for rollout in rollouts:
        assert rollout.token_ids[:3] == prefix
        assert rollout.prefix_len == 3
        assert len(rollout.token_ids) <= 12  # max_tokens bounds prefix and generated part together
        assert len(rollout.logprobs) == len(rollout.token_ids) - 3
        (expected,) = LocalLearner(model).logprobs([(*PROMPT.token_ids, *rollout.token_ids)])
        assert rollout.logprobs == pytest.approx(expected[-len(rollout.logprobs) :], abs=1e-5)
        assert rollout.token_ids != plain["sums/0", rollout.index].token_ids


def test_finish_reasons_and_text(pool: Pool, model: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    long = RolloutRequest(PROMPT, 60, Sampling(60, temperature=1.5))
    rollouts = list(pool.generate([long], step=0))
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        assert (rollout.token_ids[-1] == tokenizer.eos_token_id) == (
            rollout.finish_reason == "stop"
        )
        assert rollout.text == tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
        assert tokenizer.eos_token not in rollout.text


def test_logprobs_are_those_of_the_sampling_distribution(pool: Pool, model: str) -> None:
    import torch

    learner = LocalLearner(model)
    sampled = RolloutRequest(PROMPT, 8, Sampling(1, temperature=0.5, top_p=0.3))
    with torch.no_grad():
        scores = learner.model(torch.tensor([PROMPT.token_ids])).logits[0, -1] / 0.5
    probs, order = scores.softmax(-1).sort(descending=True)
    kept = order[probs.cumsum(-1) - probs < 0.3]
    nucleus = dict(zip(kept.tolist(), scores[kept].log_softmax(-1).tolist(), strict=True))
    for rollout in pool.generate([sampled], step=0):
        assert rollout.logprobs[0] == pytest.approx(nucleus[rollout.token_ids[0]], abs=1e-5)


def test_greedy(pool: Pool, model: str) -> None:
    greedy = RolloutRequest(PROMPT, 2, Sampling(5, temperature=0))
    first, second = pool.generate([greedy], step=0)
    assert first.token_ids == second.token_ids
    (expected,) = LocalLearner(model).logprobs([(*PROMPT.token_ids, *first.token_ids)])
    assert first.logprobs == pytest.approx(expected[-len(first.logprobs) :], abs=1e-5)


def test_short_samples_are_not_held_up_by_long_ones(pool: Pool) -> None:
    long = RolloutRequest(Prompt("long", (), (9, 9)), 2, Sampling(100, temperature=0.01))
    short = RolloutRequest(Prompt("short", (), (8, 8)), 6, Sampling(1))
    order = [rollout.prompt_id for rollout in pool.generate([long, short], step=0)]
    assert sorted(order) == ["long"] * 2 + ["short"] * 6
    assert order[:6] == ["short"] * 6


def test_a_burst_of_prompts_beyond_one_engine_step_is_sampled(ray_session, model: str) -> None:
    """More prompt tokens at once than an engine step takes: seeded requests must not be computed in pieces."""
    length = 300
    wide = CONFIG.model_copy(update={"max_prompt_length": length, "max_num_seqs": 32})
    assert wide.max_num_seqs * length > 2 * MIN_BATCHED_TOKENS
    prompts = [
        Prompt(f"long/{i}", (), tuple((7 * i + j) % 250 + 3 for j in range(length)))
        for i in range(wide.max_num_seqs)
    ]
    pool = Pool(model, wide, dtype="float32", seed=0)
    try:
        pool.wait_started()
        requests = [RolloutRequest(prompt, 1, Sampling(2)) for prompt in prompts]
        assert len(list(pool.generate(requests, step=0))) == len(prompts)
    finally:
        pool.close()


def test_too_long_prompt_is_named(pool: Pool) -> None:
    wide = RolloutRequest(Prompt("wide", (), tuple(range(100))), 1, Sampling(64))
    with pytest.raises(RolloutError, match=r"prompt wide: 100 prompt tokens"):
        list(pool.generate([wide], step=0))
    with pytest.raises(RolloutError, match=r"a forced prefix of 4"):
        list(pool.generate([request(1, max_tokens=4, prefix=(1, 2, 3, 4))], step=0))


def test_leaving_early_drains_the_workers(pool: Pool) -> None:
    import ray
    from ray.exceptions import RayTaskError

    endless = RolloutRequest(PROMPT, 12, Sampling(110, temperature=0.01))
    stream = pool.generate([endless, request(1, max_tokens=1)], step=0)
    next(stream)
    with pytest.raises(RayTaskError, match="drain the pool before a weight sync"):
        ray.get([receiver.start_weight_update.remote() for receiver in pool.receivers()])
    stream.close()
    assert {row["owes"] for row in pool.status()} == {0}
    assert len(list(pool.generate([request(2)], step=0))) == 2


def test_start_failure_tells_vllms_cause(ray_session, model: str) -> None:
    """The KV cache fails in vLLM's own process, whose exception does not reach us by itself."""
    with pytest.raises(RolloutError, match=r"rollout-0 could not start on .*kv cache.*Decrease"):
        Pool(
            model, CONFIG.model_copy(update={"kv_cache_gib": 1e5}), dtype="float32", seed=0
        ).wait_started()


def test_start_deadline_names_the_worker(ray_session, model: str) -> None:
    hurried = CONFIG.model_copy(update={"start_timeout_seconds": 0.1})
    with pytest.raises(RolloutError, match="rollout-0 did not finish start before its deadline"):
        Pool(model, hurried, dtype="float32", seed=0).wait_started()


def pid_of(receiver: Any) -> int:
    import ray

    place: Any = ray.get(receiver.place.remote())
    return place.pid


def test_death_of_a_worker_leaves_no_process_and_loses_no_sample(pool: Pool) -> None:
    victim, *engines = family(pid_of(pool.receivers()[1]))
    stream = pool.generate([RolloutRequest(PROMPT, 30, Sampling(100, temperature=0.01))], step=0)
    rollouts = [next(stream)]
    os.kill(victim, signal.SIGKILL)
    assert len(by_index(iter([*rollouts, *stream]))) == 30
    assert all_gone(engines, 20)
    assert "rollout-1 died" in pool.losses[0].reason


def test_death_of_vllms_own_process_is_noticed_too(pool: Pool) -> None:
    actor, *others = family(pid_of(pool.receivers()[0]))
    (engine,) = [p for p in others if b"EngineCore" in Path(f"/proc/{p}/cmdline").read_bytes()]
    before = len(pool.losses)
    os.kill(engine, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while len(pool.losses) == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "vLLM died in rollout worker" in pool.losses[before].reason
    assert all_gone([actor, *others], 5)
    assert len(list(pool.generate([request(2)], step=0))) == 2


# Last.
def test_closing_is_quick_and_leaves_no_process(pool: Pool) -> None:
    everyone = [pid for actor in pool.receivers() for pid in family(pid_of(actor))]
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5
    assert all_gone(everyone, 5)

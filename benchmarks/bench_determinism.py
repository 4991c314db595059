"""Does a sample of vLLM depend on what runs beside it? Tokens and log-probs to the bit, and what decoding costs.

    python benchmarks/bench_determinism.py MODEL_FOLDER [--num-seqs 1,4,64] [--prompt-tokens 40,280]

Every setting draws the same samples four times: all at once, once more (prefix cache warm), in another order, and one
request after the other. The first drawing of the first setting is what all are compared with.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterable

from plait.engine.types import Prompt, Rollout, RolloutRequest, Sampling
from plait.launch.cluster import ray_cluster
from plait.rollouts.config import RolloutConfig
from plait.rollouts.pool import Pool

Drawn = dict[tuple[str, int], tuple[tuple[int, ...], tuple[float, ...]]]
VOCABULARY = 300


def make_requests(prompt_tokens: list[int]) -> list[RolloutRequest]:
    """Prompts with common beginnings of these lengths."""
    rng = random.Random(0)
    common = [rng.randrange(3, VOCABULARY) for _ in range(max(prompt_tokens))]
    prompts = []
    for i in range(12):
        tail = [rng.randrange(3, VOCABULARY) for _ in range(3 + i)]
        start = common[: prompt_tokens[i % len(prompt_tokens)]]
        prompts.append(Prompt(f"p{i}", (), (*start, *tail)))
    return [RolloutRequest(prompt, 3, Sampling(24)) for prompt in prompts]


def drawn(rollouts: Iterable[Rollout]) -> Drawn:
    return {(r.prompt_id, r.index): (r.token_ids, r.logprobs) for r in rollouts}


def difference(one: Drawn, other: Drawn) -> str:
    tokens = sum(one[key][0] != other[key][0] for key in one)
    bits = sum(one[key] != other[key] for key in one)
    return f"other tokens {tokens}/{len(one)}, other bits {bits}/{len(one)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--num-seqs", default="1,4,64")
    parser.add_argument("--num-cpus", default="2,1")
    parser.add_argument("--prompt-tokens", default="40,280")
    chosen = parser.parse_args()
    requests = make_requests([int(n) for n in chosen.prompt_tokens.split(",")])
    shuffled = random.Random(1).sample(requests, len(requests))
    first: Drawn | None = None
    for num_seqs in map(int, chosen.num_seqs.split(",")):
        for num_cpus in map(int, chosen.num_cpus.split(",")):
            config = RolloutConfig(
                max_prompt_length=512,
                max_response_length=64,
                max_num_seqs=num_seqs,
                num_cpus=num_cpus,
                kv_cache_gib=0.5,
            )
            pool = Pool(chosen.model, config, dtype="float32", seed=0)
            try:
                pool.wait_started()
                whole = drawn(pool.generate(requests, step=0))
                first = first or whole
                started = time.perf_counter()
                again = drawn(pool.generate(requests, step=0))
                seconds = time.perf_counter() - started
                other = drawn(pool.generate(shuffled, step=0))
                single = [r for request in shuffled for r in pool.generate([request], step=0)]
            finally:
                pool.close()
            rate = sum(len(tokens) for tokens, _ in again.values()) / seconds
            print(f"max_num_seqs {num_seqs}, num_cpus {num_cpus}: {rate:.0f} tokens/s")
            print(f"  against the first setting: {difference(first, whole)}")
            print(f"  drawn again:               {difference(whole, again)}")
            print(f"  in another order:          {difference(whole, other)}")
            print(f"  one request at a time:     {difference(whole, drawn(single))}", flush=True)


if __name__ == "__main__":
    with ray_cluster():
        main()

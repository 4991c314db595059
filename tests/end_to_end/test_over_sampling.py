"""A whole run that samples more prompts than it trains: real Ray, vLLM and DeepSpeed, a tiny model."""

from __future__ import annotations

import json

from end_to_end.command_line import no_verifier, plait, read_lines, tiny_recipe, write_recipe

STEPS, PER_STEP, EXTRA = 4, 3, 3


def test_samples_go_on_under_new_weights_and_every_prompt_is_trained_once(tiny_model, tmp_path):
    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "parity.py").write_text(
        "def grade(prompt, completion):\n    return float(len(completion) % 2)\n"
    )
    recipe = tiny_recipe(
        tiny_model,
        run={"name": "over"},
        reward=no_verifier("parity:grade"),
        rollouts={"max_response_length": 48, "max_num_seqs": 4},
        loop={"steps": STEPS, "prompts_per_step": PER_STEP, "extra_prompts": EXTRA},
        eval={"num_prompts": 0},
    )
    recipe["algorithm"] = {"type": "grpo", "rollouts_per_prompt": 4, "sampler_ratio_cap": 2.0}
    plait(tmp_path, "train", write_recipe(tmp_path, "over.yaml", recipe))
    run = tmp_path / "runs" / "over"
    names = [name for row in read_lines(run / "steps.jsonl") for name, _ in row["prompts"]]
    assert len(names) == len(set(names)) == STEPS * PER_STEP
    steps = [row for row in read_lines(run / "metrics.jsonl") if "time/step" in row]
    assert [row["prompts/waiting"] for row in steps] == [EXTRA] * (STEPS - 1) + [0]
    assert sum(row["rollouts/waiting_tokens"] for row in steps) > 0
    assert sum(row["rollouts/discarded_tokens"] for row in steps) == 0
    assert max(row["staleness/max"] for row in steps) >= 1
    samples = [row for path in (run / "rollouts").glob("step-*") for row in read_lines(path)]
    assert len(samples) == STEPS * PER_STEP * 4
    assert {row["finish_reason"] for row in samples} <= {"stop", "length"}

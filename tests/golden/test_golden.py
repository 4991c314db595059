"""Reference numbers, and proof that a wrong formula would not reproduce them."""

import json

import numpy as np
import pytest

from golden_cases import CASES, case_of, fails
from plait.algorithms import advantages, expert_losses, losses, schedules
from plait.algorithms.expert_base import TokenLoss
from plait.launch.golden import check_case, check_file


@pytest.mark.parametrize("name", CASES)
def test_case_is_reproduced(name):
    result = check_case(CASES[name])
    assert result.ok, result.problem
    assert result.max_abs_err < 1e-9


def test_wrong_ddof_fails(monkeypatch):
    def with_ddof_0(rewards, epsilon):
        values = np.asarray(rewards)
        return list((values - values.mean()) / (values.std() + epsilon))

    monkeypatch.setattr(advantages, "standardize", with_ddof_0)
    assert fails("grpo/loss/default")
    assert fails("grpo/advantage/reinforce++")


def test_leave_one_out_without_its_factor_fails(monkeypatch):
    monkeypatch.setattr(advantages, "leave_one_out", advantages.center)
    assert fails("grpo/advantage/rloo")


@pytest.mark.parametrize(
    ("loss", "case"),
    [("Dft", "sft/loss/probability weights, entropy bonus"), ("Phi", "chord/loss/phi")],
)
def test_weight_with_gradient_fails(monkeypatch, loss, case):
    def attached(self, tokens):
        p = tokens.logprobs.exp()
        return TokenLoss(-(p if loss == "Dft" else p * (1 - p)) * tokens.logprobs)

    monkeypatch.setattr(getattr(expert_losses, loss), "__call__", attached)
    assert fails(case)


@pytest.mark.parametrize(
    "case",
    [
        "sft/loss/default",
        "sft/loss/rows normalizer",
        "grpo/loss/default",
        "grpo/loss/dr_grpo",
        "grpo/loss/dapo",
        "chord/loss/mu at step 50",
        "luffy/loss/default",
        "luffy/loss/paper equation",
        "srft/loss/paper",
        "srft/loss/hpt_repo",
        "hpt/loss/one rl prompt, one sft prompt",
        "super_rl/loss/mixed",
        "visurf/loss/weak model",
        "topr/loss/default",
        "rift/loss/default",
        "rift/loss/row mean, split",
        "polychromic/loss/sets of 2",
        "ppo/loss/default",
        "ppo/loss/critic",
    ],
)
def test_one_more_token_and_row_in_the_denominator_fails(monkeypatch, case):
    normalize = losses.Members.normalize

    def wrong(self, values, batch, normalizer, max_response_length):
        counts = losses.Members(self.mask, self.tokens + 1, self.rows + 1)
        return normalize(counts, values, batch, normalizer, max_response_length)

    monkeypatch.setattr(losses.Members, "normalize", wrong)
    assert fails(case)


@pytest.mark.parametrize(
    "case", ["sft/loss/token weights, split", "grpo/loss/kl, entropy, sampler correction, split"]
)
def test_denominators_of_the_micro_batch_fail(monkeypatch, case):
    """The commonest silent bug of the field: a mean of micro-batch means."""
    from dataclasses import replace

    from plait.engine import batch as batching
    from plait.launch import golden

    def local(batch, rows):
        part = batching.select(batch, rows)
        return replace(part, denom=batching.count(part))

    monkeypatch.setattr(golden, "select", local)
    assert fails(case)


def test_unclipped_ratio_fails(monkeypatch):
    component = losses.policy_component

    def unclipped(out, batch, config, members=None):
        free = config.model_copy(update={"clip_low": None, "clip_high": None})
        return component(out, batch, free, members)

    monkeypatch.setattr("plait.algorithms.grpo.policy_component", unclipped)
    assert fails("grpo/loss/default")


def test_token_ratio_instead_of_sequence_ratio_fails(monkeypatch):
    ratio = losses.policy_ratio
    monkeypatch.setattr(losses, "policy_ratio", lambda o, b, m, level: ratio(o, b, m, "token"))
    assert fails("grpo/loss/gspo")


def test_missing_sampler_correction_fails(monkeypatch):
    monkeypatch.setattr(losses, "sampler_correction", lambda batch, config: batch.weights**0)
    assert fails("grpo/loss/kl, entropy, sampler correction, split")


def test_wrong_sign_of_the_entropy_fails(monkeypatch):
    entropy = losses.entropy_component

    def flipped(out, batch, coef, members):
        value, metrics = entropy(out, batch, coef, members)
        return -value, metrics

    monkeypatch.setattr("plait.algorithms.sft.entropy_component", flipped)
    assert fails("sft/loss/probability weights, entropy bonus")


def test_other_kl_estimator_fails():
    for estimator in ("k1", "k2"):
        assert fails("grpo/loss/kl, entropy, sampler correction, split", kl_estimator=estimator)


def test_linear_instead_of_cosine_decay_fails(monkeypatch):
    def linear(step, start, end, num_steps):
        return end if step >= num_steps else start + (end - start) * step / num_steps

    monkeypatch.setattr(schedules, "cosine", linear)
    assert fails("chord/schedule/decay only")
    assert fails("chord/loss/mu at step 50")


def test_kept_uniform_groups_fail(monkeypatch):
    monkeypatch.setattr("plait.algorithms.base.uniform_groups", lambda rewards, groups: set())
    assert fails("grpo/loss/dapo")


def test_report_names_what_is_off(tmp_path):
    case = case_of("sft/loss/default")
    case["expect"]["loss"] += 1e-3
    case["expect"]["metrics"]["surprise"] = 1.0
    file = tmp_path / "g.json"
    file.write_text(json.dumps({"schema": 1, "cases": [case]}))
    (result,) = check_file(file)
    assert not result.ok
    assert "loss: expected" in result.problem or "surprise" in result.problem
    assert "FAIL" in str(result)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"algorithm": "grpoo"}, "no such algorithm"),
        ({"kind": "lossy"}, "unknown kind"),
        ({"config": {"clip_hihg": 1}}, "clip_hihg"),
        ({"update": "sftt"}, "has no loss"),
    ],
)
def test_unknown_names_fail_the_case(change, words):
    result = check_case({**CASES["grpo/loss/default"], **change})
    assert not result.ok
    assert words in result.problem


def test_row_without_tokens_counts_for_nothing():
    case = case_of("sft/loss/default")
    empty = {"source": "expert", "group": "z", "reward": None, "response_ids": [], "logits": []}
    case["rows"].append(empty)
    case["expect"]["grad_logits"].append([])
    assert check_case(case).ok

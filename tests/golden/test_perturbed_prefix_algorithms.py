"""Golden cases of the prefix and interleaving algorithms fail when a formula is off."""

import pytest

from golden_cases import fails
from plait.algorithms import losses, one_token_rollout, prefix_rft, relift, sasr, uft
from plait.engine import token_samples


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("uft/loss/default", {"expert_coef": 0.002}),
        ("uft/loss/default", {"kl_coef": 0.0}),
        ("uft/loss/default", {"entropy_scope": "all"}),
        ("uft/loss/split", {"normalizer": "rows"}),
        ("uft/loss/split", {"expert_normalizer": "rows"}),
        ("uft/trace/binomial", {"hint_buckets": 4}),
        ("uft/trace/binomial", {"hint_sampling": "uniform"}),
        ("prefix_rft/loss/default", {"entropy_keep_fraction": 0.2}),
        ("prefix_rft/loss/default", {"prefix_advantage": "separate"}),
        ("prefix_rft/loss/separate, prefix not clipped, split", {"prefix_advantage": "shared"}),
        ("prefix_rft/loss/default", {"advantage": "group_std"}),
        ("prefix_rft/trace/default", {"min_prefix_tokens": 13}),
        ("relift/loss/sft", {"expert_entropy_coef": 0.0}),
        ("relift/loss/sft, paper", {"expert_normalizer": "tokens"}),
        ("relift/loss/main", {"normalizer": "tokens"}),
        ("relift/trace/buffer of 3", {"expert_batch_size": 2}),
        ("sasr/loss/main", {"kl_coef": 0.02}),
        ("sasr/loss/main, split", {"normalizer": "tokens"}),
        ("sasr/trace/gate", {"gate_scale": 0.5}),
        ("sasr/trace/gate", {"warmup_steps": 1}),
        ("one_token_rollout/loss/default", {"miss_reward": 0.1}),
        ("one_token_rollout/loss/default", {"tempered_logprobs": True}),
        ("one_token_rollout/loss/exact expectation", {"sampling_temperature": 1.0}),
        ("one_token_rollout/trace/sampler", {"sampling_temperature": 1.0}),
    ],
)
def test_other_values_fail(name, config):
    assert fails(name, **config)


def test_hint_probability_at_step_instead_of_step_plus_1_fails(monkeypatch):
    right = uft.hint_probability
    monkeypatch.setattr(uft, "hint_probability", lambda step, config: right(step - 1, config))
    assert fails("uft/schedule/default")
    assert fails("uft/trace/binomial")


def test_filter_that_keeps_the_lowest_entropy_fails(monkeypatch):
    from dataclasses import replace

    right = prefix_rft.keep_highest_entropy

    def lowest(batch, fraction):
        flipped = right(replace(batch, old_entropy=-batch.old_entropy), fraction)
        return replace(batch, advantages=flipped.advantages)

    monkeypatch.setattr(prefix_rft, "keep_highest_entropy", lowest)
    assert fails("prefix_rft/loss/recorded entropy")
    assert fails("prefix_rft/loss/default")


def test_clipped_prefix_fails_where_it_should_be_free(monkeypatch):
    right = losses.policy_component
    monkeypatch.setattr(
        prefix_rft, "policy_component", lambda o, b, c, members, free: right(o, b, c, members)
    )
    assert fails("prefix_rft/loss/separate, prefix not clipped, split")


def test_prefix_outside_the_surrogate_fails(monkeypatch):
    right = losses.policy_component
    monkeypatch.setattr(prefix_rft, "policy_component", lambda o, b, c, *_: right(o, b, c))
    assert fails("prefix_rft/loss/default")


def test_rounding_instead_of_flooring_the_prefix_fails(monkeypatch):
    monkeypatch.setattr(prefix_rft, "floor", round)
    assert fails("prefix_rft/trace/default")


def test_newest_last_fails(monkeypatch):
    def append(self, failed):
        size = self.config.expert_batch_size
        self.buffer = [*self.buffer, *failed]
        if len(self.buffer) < size:
            return None
        batch, self.buffer = self.buffer[:size], self.buffer[size:]
        return batch

    monkeypatch.setattr(relift.Relift, "take_batch", append)
    assert fails("relift/trace/buffer of 3")


def test_norm_of_the_first_warm_up_step_fails(monkeypatch):
    def observe(self, report):
        self.last_norm = report.grad_norm
        self.warmup_norm = self.warmup_norm or report.grad_norm

    monkeypatch.setattr(sasr.Sasr, "observe", observe)
    assert fails("sasr/trace/gate")


def test_hits_without_the_misses_fail(monkeypatch):
    right = token_samples.sampled_sums

    def without(*args):
        rate, hits, misses = right(*args)
        return rate, hits, misses * 0

    monkeypatch.setattr("plait.launch.golden_prefix.sampled_sums", without)
    assert fails("one_token_rollout/loss/default")


def test_gradient_through_the_sampling_probabilities_fails(monkeypatch):
    def attached(logits, targets, sampling):
        p = (logits / sampling.temperature).softmax(-1)
        logprobs = logits.log_softmax(-1)
        hit = p.gather(-1, targets[:, None]).squeeze(-1)
        hits = hit * logprobs.gather(-1, targets[:, None]).squeeze(-1)
        return hit.detach(), hits, (p * logprobs).sum(-1) - hits

    monkeypatch.setattr("plait.launch.golden_prefix.expected_sums", attached)
    assert fails("one_token_rollout/loss/exact expectation")


def test_token_mean_of_the_row_normalizer_fails(monkeypatch):
    right = losses.Members.normalize
    monkeypatch.setattr(
        one_token_rollout.Members, "normalize", lambda s, v, b, n, m: right(s, v, b, "tokens", m)
    )
    assert fails("one_token_rollout/loss/tempered, rows, split")

"""Relations between expert losses that hold for any rows (numbers refer to the list in docs/expert-losses.md)."""

from typing import Any

import numpy as np
import pytest

from cases import assert_same, changed, random_case, solve
from expert_cases import STEPS, TOKENS_ONLY, VARIANTS, case_of
from plait.algorithms import Setup
from plait.algorithms.sft import Sft, SftConfig
from plait.engine.contracts import Need
from plait.engine.types import Sampling
from plait.launch.config import load_recipe
from plait.launch.contradictions import unfed_by

MINIMAL = """
model: some/model
algorithm: {type: sft}
data: {type: jsonl, path: data.jsonl}
reward: math
loop: {steps: 3}
"""
SEEDS = range(3)


def with_loss(case: dict[str, Any], **loss: Any) -> dict[str, Any]:
    return changed(case, config={**case["config"], "expert_loss": loss})


def own_logprobs(case: dict[str, Any], column: str) -> dict[str, Any]:
    case = changed(case)
    for row in case["rows"]:
        logits = np.asarray(row["logits"])
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        row[column] = logprobs[np.arange(len(logits)), row["response_ids"]].tolist()
    return case


@pytest.mark.parametrize("seed", SEEDS)
def test_01_prob_family_1_has_the_gradient_of_dft_and_0_is_nll(seed):
    case = case_of(seed, {"type": "nll"})
    assert_same(with_loss(case, type="prob_family"), with_loss(case, type="dft"), loss=False)
    assert_same(with_loss(case, type="prob_family", alpha=0.0), case)
    loss, grads = solve(with_loss(case, type="prob_family", alpha=1e-5))
    nll, nll_grads = solve(case)
    assert loss == pytest.approx(nll, rel=1e-3)
    for a, b in zip(grads, nll_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_02_psft_on_the_current_policy_is_nll_with_loss_minus_1(seed):
    nll = own_logprobs(case_of(seed, {"type": "nll"}, "ones"), "old_logprobs")
    psft = with_loss(nll, type="psft")
    assert_same(psft, nll, loss=False)
    assert solve(psft)[0] == pytest.approx(-1)


@pytest.mark.parametrize("seed", SEEDS)
def test_03_asft_without_kl_is_dft_or_nll(seed):
    case = case_of(seed, {"type": "nll"})
    asft = {"type": "asft", "kl_coef": 0.0}
    assert_same(with_loss(case, **asft), with_loss(case, type="dft"))
    assert_same(with_loss(case, **asft, base_weight="one"), case)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_03_asft_kl_to_itself_is_0(seed, direction):
    case = case_of(seed, {"type": "nll"})
    for row in case["rows"]:
        row["ref_logits"] = row["logits"]
    assert_same(
        with_loss(case, type="asft", base_weight="one", kl_coef=3.0, kl_direction=direction), case
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("normalizer", ["tokens", "rows", "constant"])
def test_04_profit_higher_is_prob_family_0_above(seed, normalizer):
    case = case_of(seed, {"type": "nll"}, normalizer=normalizer, max_response_length=7)
    assert_same(
        with_loss(case, type="profit", threshold=0.15, denominator="kept_tokens"),
        with_loss(case, type="prob_family", alpha=0.0, keep_probability_above=0.15),
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_05_talr_at_temperature_1_without_floor_is_dft(seed):
    case = case_of(seed, {"type": "dft"})
    assert_same(with_loss(case, type="talr", temperature=1.0, weight_floor=0.0), case)


@pytest.mark.parametrize("seed", SEEDS)
def test_05_talr_with_a_floor_of_1_is_nll(seed):
    case = case_of(seed, {"type": "nll"})
    assert_same(with_loss(case, type="talr", weight_floor=1.0), case)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("denominator", ["kept_tokens", "weight_sum"])
def test_06_token_weight_with_binary_weights_is_nll(seed, denominator):
    case = case_of(seed, {"type": "nll"}, "binary")
    assert_same(with_loss(case, type="token_weight", denominator=denominator), case)


@pytest.mark.parametrize("seed", SEEDS)
def test_09_weights_of_1_are_nll(seed):
    case = own_logprobs(case_of(seed, {"type": "nll"}), "ref_logprobs")
    for row in case["rows"]:
        row["previous_loss"] = None
    assert_same(with_loss(case, type="eaft", exponent=0.0), case)
    assert_same(with_loss(case, type="iw_sft"), case)
    assert_same(with_loss(case, type="iw_sft", level="token"), case)
    assert_same(with_loss(case, type="glow"), case)


@pytest.mark.parametrize("seed", SEEDS)
def test_keeping_everything_is_nll(seed):
    case = case_of(seed, {"type": "nll"})
    assert_same(with_loss(case, type="nll", first_tokens=99), case)
    assert_same(with_loss(case, type="token_cleaning", keep_fraction=1.0), case)
    assert_same(with_loss(case, type="sstoken", keep_fraction=1.0), case)
    assert_same(with_loss(case, type="sstoken", warmup_steps=4), case)
    assert_same(with_loss(case, type="forgetting", keep_fraction=1.0, **STEPS), case)


@pytest.mark.parametrize("seed", SEEDS)
def test_keeping_nothing_is_zero(seed):
    case = case_of(seed, {"type": "nll"})
    for loss in (
        {"type": "token_cleaning", "keep_fraction": 0.0},
        {"type": "prob_family", "keep_probability_above": 1.0},
        {"type": "sstoken", "keep_fraction": 0.0},
    ):
        value, grads = solve(with_loss(case, **loss))
        assert value == 0
        assert all((grad == 0).all() for grad in grads)


def trained_tokens(case: dict[str, Any]) -> list[list[int]]:
    return [np.flatnonzero(np.abs(grad).sum(-1)).tolist() for grad in solve(case)[1]]


def test_sstoken_without_gap_keeps_what_attends_to_the_prompt():
    case = case_of(0, {"type": "sstoken", "loss_gap_weight": 0.0, "keep_fraction": 0.5}, "ones")
    for row, kept in zip(case["rows"][:5], trained_tokens(case), strict=False):
        attention = np.asarray(row["prompt_attention"])
        count = -(-len(attention) // 2)
        assert kept == sorted(np.argsort(-attention, kind="stable")[:count].tolist())


@pytest.mark.parametrize("scope", ["row", "minibatch"])
def test_token_cleaning_ranks_within_its_scope(scope):
    case = case_of(1, {"type": "token_cleaning", "scope": scope, "keep_fraction": 0.5}, "ones")
    rows = case["rows"][:5]
    for i, row in enumerate(rows):  # rows of higher index have higher scores throughout
        row["base_logprobs"] = [-10.0 * i - t for t in range(len(row["response_ids"]))]
        row["ref_logprobs"] = [0.0] * len(row["response_ids"])
    lengths = [len(row["response_ids"]) for row in rows]
    expected = [list(range(n - n // 2, n)) for n in lengths]
    if scope == "minibatch":
        places = [(i, t) for i, n in enumerate(lengths) for t in range(n)]
        chosen = places[len(places) - len(places) // 2 :]
        expected = [[t for j, t in chosen if j == i] for i in range(5)]
    assert trained_tokens(case)[:5] == expected


@pytest.mark.parametrize(("scope", "kept"), [("minibatch", [[0, 1], [0]]), ("row", [[0], [0]])])
def test_ties_go_to_the_earlier_row_then_the_earlier_token(scope, kept):
    case = case_of(1, {"type": "token_cleaning", "scope": scope, "keep_fraction": 0.75}, "ones")
    keys = ("response_ids", "logits", "token_weights", "base_logprobs", "ref_logprobs")
    for row in case["rows"]:
        for key in keys:
            row[key] = (row[key] * 2)[:2]
        row["base_logprobs"] = row["ref_logprobs"] = [0.0, 0.0]
        row["prefix_len"] = 2
    case["rows"] = case["rows"][:2]
    assert trained_tokens(case) == kept


@pytest.mark.parametrize("name", VARIANTS)
def test_11_logits_at_unsupervised_positions_never_matter(name):
    case = case_of(4, VARIANTS[name])
    moved = changed(case)
    for row in moved["rows"]:
        for t, weight in enumerate(row["token_weights"]):
            if weight == 0 or row["source"] == "policy":
                row["logits"][t] = [7.0, *row["logits"][t][1:]]
    assert_same(case, moved)


@pytest.mark.parametrize(
    ("name", "normalizer"),
    [
        (name, normalizer)
        for name in VARIANTS
        for normalizer in ("tokens", "rows", "constant")
        if normalizer == "tokens" or name not in TOKENS_ONLY  # these have counts of their own
    ],
)
def test_12_any_split_into_micro_batches_is_the_same(name, normalizer):
    case = case_of(5, VARIANTS[name], normalizer=normalizer, max_response_length=7)
    for split in ([[0], [1], [2], [3], [4], [5]], [[4, 5], [0, 1], [3, 2]], [[5, 0, 3], [1, 4, 2]]):
        assert_same(case, changed(case, micro_batches=split))


@pytest.mark.parametrize("name", VARIANTS)
def test_metrics_do_not_depend_on_the_split(name):
    from plait.launch.golden import run_loss

    case = case_of(6, VARIANTS[name])
    whole = run_loss(case)["metrics"]
    parts = run_loss(changed(case, micro_batches=[[3], [0, 5], [2, 1, 4]]))["metrics"]
    assert parts == pytest.approx(whole, abs=1e-9)
    assert "expert_probability" in whole


@pytest.mark.parametrize("name", VARIANTS)
def test_without_supervised_tokens_everything_is_zero(name):
    case = case_of(7, VARIANTS[name])
    for row in case["rows"]:
        row["token_weights"] = [0.0] * len(row["response_ids"])
    loss, grads = solve(case)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("name", TOKENS_ONLY)
def test_counts_of_its_own_refuse_another_normalizer(name):
    with pytest.raises(ValueError, match="normalizer must be tokens"):
        solve(case_of(0, VARIANTS[name], normalizer="rows"))


def test_reward_signed_types_need_expert_rows_that_stand_alone():
    with pytest.raises(ValueError, match="stand alone"):
        solve(random_case(0, "chord", expert_loss={"type": "topr"}))


@pytest.mark.parametrize("loss", VARIANTS)
def test_recipes_are_accepted(minimal_sft, loss):
    overrides = [f"algorithm.expert_loss.{key}={value}" for key, value in VARIANTS[loss].items()]
    assert load_recipe(minimal_sft, overrides).build_algorithm().config.expert_loss


class Starving(Sft):
    """A method of somebody's own that forgets its expert loss."""

    @property
    def needs(self) -> dict[str, frozenset[Need]]:
        return {"main": frozenset({"demonstrations"})}

    def coefs(self, step):
        return {}


@pytest.mark.parametrize(
    ("loss", "need"), [("asft", "ref_kl"), ("forgetting", "negative_coef"), ("talr", "stats")]
)
def test_a_host_that_does_not_feed_its_expert_loss_is_refused(loss, need):
    config = SftConfig.model_validate({"expert_loss": VARIANTS[loss]})
    setup = Setup(Sampling(8))
    (problem,) = unfed_by("algorithm", Starving(config, setup))
    assert problem.path == "algorithm.expert_loss.type"
    assert need in problem.message
    assert unfed_by("algorithm", Sft(config, setup)) == []


@pytest.fixture
def minimal_sft(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(MINIMAL)
    return file

"""amft: who is rolled out and what trains, the controller over a step, its state."""

import pytest

from cases import assert_same, random_case
from plait.algorithms import Setup
from plait.algorithms.amft import Amft, AmftConfig, meta_gradient
from plait.engine.probes import GradientComparison
from plait.engine.types import (
    Demonstration,
    Prompt,
    Rollout,
    RolloutGroup,
    Sampling,
    Score,
    Source,
    UpdateReport,
)

SEEDS = range(4)


@pytest.mark.parametrize("mu", [0.1, 0.7])
@pytest.mark.parametrize("seed", SEEDS)
def test_25_without_entropy_it_is_chord_at_the_same_mu(seed, mu):
    amft = random_case(seed, "amft", entropy_coef=0.0, kl_coef=0.03)
    chord = random_case(seed, "chord", kl_coef=0.03)
    assert_same({**amft, "coefs": {"mu": mu}}, {**chord, "coefs": {"mu": mu}})


def amft(**config):
    options = {
        "warmup_steps": 2,
        "rollouts_per_prompt": 2,
        "validation_prompts": 2,
        "meta_every": 3,
    }
    return Amft(AmftConfig.model_validate({**options, **config}), Setup(Sampling(8)))


def prompt(name, demonstrated=True):
    found = (Demonstration((5, 2), "5"),) if demonstrated else ()
    return Prompt(name, ({"role": "user", "content": "?"},), (3, 4), "5", demonstrations=found)


def group(of):
    rollouts = [Rollout(of.prompt_id, i, (7, 2), 0, (-1.0, -1.0), 0, "stop", "7") for i in range(2)]
    return RolloutGroup(of, tuple(rollouts), (Score.ok(1.0), Score.ok(0.0)))


def play(algorithm, step, prompts, extra=()):
    """Plan, roll out and assemble one step; returns the update and the number of rollout rounds."""
    drawn = iter(extra)
    plan = algorithm.plan(prompts, (), step)
    rounds, requests = [], plan.requests
    while requests:
        rounds.append([group(r.prompt) for r in requests])
        requests = algorithm.follow_up(rounds, step, lambda n: [next(drawn) for _ in range(n)])
    (update,) = algorithm.assemble(plan, [g for r in rounds for g in r], step)
    return update, len(rounds)


def sources(update):
    return {
        (sample.group_id, Source(int(sample.source[-1])).name.lower()) for sample in update.samples
    }


def test_the_warm_up_trains_demonstrations_alone():
    algorithm = amft()
    update, rounds = play(algorithm, 1, [prompt("a"), prompt("b", demonstrated=False)])
    assert rounds == 0
    assert update.coefs["mu"] == 1.0
    assert sources(update) == {("a", "expert")}
    assert algorithm.probes([update], 1) == {}
    algorithm.observe(UpdateReport("main", 1.0, {"loss": 1.0}, 1e-3))
    assert algorithm.state_dict() == {"mu": 0.5, "entropy_target": None}


def test_validation_prompts_are_rolled_out_and_train_nothing():
    algorithm = amft()
    extra = [prompt("v"), prompt("w")]
    update, rounds = play(algorithm, 2, [prompt("a"), prompt("b", demonstrated=False)], extra)
    assert rounds == 2
    assert update.coefs["mu"] == 0.5
    assert sources(update) == {("a", "expert"), ("a", "policy"), ("b", "policy")}
    probes = algorithm.probes([update], 2)
    assert {s.group_id for s in probes["validation"].samples} == {"v", "w"}
    assert all(s.advantages[-1] != 0 for s in probes["validation"].samples)
    assert probes["sft"].samples is probes["rl"].samples is update.samples
    assert (probes["sft"].coefs["mu"], probes["rl"].coefs["mu"]) == (1.0, 0.0)
    assert algorithm.ledger([update], 2).unused == {"v": "validation", "w": "validation"}
    for step, expected in ((3, 1), (4, 1), (5, 2)):
        assert play(algorithm, step, [prompt("a")], extra)[1] == expected


def comparison(validation, sft, rl):
    vectors = (validation, sft, rl)
    gram = tuple(
        tuple(sum(a * b for a, b in zip(u, v, strict=True)) for v in vectors) for u in vectors
    )
    return GradientComparison(("validation", "sft", "rl"), gram, ({}, {}, {}))


def report(entropy, **changes):
    return UpdateReport("main", 1.0, {"policy_entropy": entropy}, 0.1, **changes)


def test_the_controller_follows_the_last_minibatch_and_starts_anew_with_each_step():
    algorithm = amft(meta_learning_rate=0.1, entropy_learning_rate=0.01)
    algorithm.open_step()
    algorithm.observe_gradients(comparison((1.0, 0.0), (3.0, 4.0), (0.0, 0.0)))
    algorithm.observe(report(2.0))
    assert algorithm.entropy_target == 2.0
    assert algorithm.mu == pytest.approx(0.5 + 0.1 * 0.6)
    algorithm.observe(report(4.0))
    assert algorithm.mu == pytest.approx(0.5 + 0.1 * 0.6 - 0.01 * 1.0)
    assert algorithm.metrics()["meta_gradient"] == pytest.approx(0.6)

    restored = amft(meta_learning_rate=0.1, entropy_learning_rate=0.01)
    restored.load_state_dict(algorithm.state_dict())
    for one in (algorithm, restored):
        one.open_step()
        one.observe(report(1.0))
        assert one.mu == pytest.approx(0.55 + 0.01)
        assert "meta_gradient" not in one.metrics()


def test_mu_stays_in_its_range():
    algorithm = amft(meta_learning_rate=10.0)
    algorithm.open_step()
    algorithm.observe_gradients(comparison((1.0,), (0.0,), (2.0,)))
    algorithm.observe(report(2.0))
    assert algorithm.mu == 0.05


def test_a_gradient_that_is_zero_moves_nothing():
    assert meta_gradient(comparison((0.0,), (1.0,), (2.0,)), 0.1, "cosine") == 0
    assert meta_gradient(comparison((1.0,), (2.0,), (2.0,)), 0.1, "raw") == 0


def test_a_start_outside_the_range_is_refused():
    with pytest.raises(ValueError, match=r"mu_start = 0\.99 is not between"):
        AmftConfig(mu_start=0.99)

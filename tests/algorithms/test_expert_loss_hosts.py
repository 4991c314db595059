"""Every method with an expert loss takes every token-level type, however the minibatch is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cases import random_case, solve
from expert_cases import VARIANTS
from plait.algorithms import ALGORITHMS, Setup
from plait.engine.errors import ConfigError
from plait.engine.types import Sampling
from plait.launch.contradictions import unfed_by
from plait.launch.demonstrations import check_demonstrations

HOSTS = [name for name, cls in ALGORITHMS.items() if "expert_loss" in cls.Config.model_fields]
REWARD_SIGNED = ("topr", "rift")
TYPES = [name for name, loss in VARIANTS.items() if loss["type"] not in REWARD_SIGNED]
FIELDS = {"super_rl": {"expert_normalizer": "tokens"}}
SFT_UPDATES = ("relift", "sasr")


def host_case(host: str, loss: dict[str, Any]) -> dict[str, Any]:
    """Policy and expert rows for the methods that mix them, expert rows for `sft` updates."""
    config = {**FIELDS.get(host, {}), "expert_loss": loss}
    mixed = host not in (*SFT_UPDATES, "sft", "regft")
    case = random_case(2, host, kinds="ppppeeee" if mixed else "eeee", **config)
    rng = np.random.default_rng(0)
    for i, row in enumerate(case["rows"]):
        n = len(row["response_ids"])
        if row["source"] != "expert":
            continue
        for name in ("base_logprobs", "history_logprobs"):
            row[name] = rng.normal(-1.8, 0.5, n).tolist()
        row |= {
            "token_weights": rng.choice([0.5, 1.0, 2.0], n).tolist(),
            "prompt_attention": rng.uniform(size=n).tolist(),
            "ref_logits": rng.normal(size=(n, len(row["logits"][0]))).tolist(),
            "previous_loss": None if i % 2 else 1.9,
        }
    return case | {"update": "sft" if host in SFT_UPDATES else "main"}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("host", HOSTS)
def test_every_host_takes_every_type(host, kind):
    loss = VARIANTS[kind]
    values = {"type": host, "expert_loss": loss, **FIELDS.get(host, {})}
    config = ALGORITHMS[host].Config.model_validate(values)
    algorithm = ALGORITHMS[host](config, Setup(Sampling(8)))
    assert unfed_by("algorithm", algorithm) == []
    case = host_case(host, loss)
    whole, grads = solve(case)
    assert np.isfinite(whole)
    assert all(np.isfinite(grad).all() for grad in grads)
    experts = [i for i, row in enumerate(case["rows"]) if row["source"] == "expert"]
    assert any(np.abs(grads[i]).max() > 0 for i in experts)
    n = len(case["rows"])
    by_source = [experts, [i for i in range(n) if i not in experts]]
    for split in ([[i] for i in range(n)], [part for part in by_source if part]):
        parts, part_grads = solve(case | {"micro_batches": split})
        assert parts == pytest.approx(whole, abs=1e-9)
        for one, other in zip(grads, part_grads, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-9, rtol=0)


@pytest.mark.parametrize("host", HOSTS)
def test_reward_signed_types_go_where_expert_rows_stand_alone(host):
    for kind in REWARD_SIGNED:
        values = {"type": host, "expert_loss": VARIANTS[kind]}
        if ALGORITHMS[host].Config.standalone_experts:
            assert ALGORITHMS[host].Config.model_validate(values)
        else:
            with pytest.raises(ValueError, match="stand alone"):
                ALGORITHMS[host].Config.model_validate(values)


@pytest.mark.parametrize("kind", ["token_weight", "glow"])
@pytest.mark.parametrize(
    "section", [{"type": "regft"}, {"type": "sft", "data_selection": {"type": "self_response"}}]
)
def test_own_responses_have_no_columns_and_no_earlier_visits(section, kind):
    """Formulas are defined for such rows too; a run would have nothing to feed them."""
    cls = ALGORITHMS[section["type"]]
    config = cls.Config.model_validate({**section, "expert_loss": VARIANTS[kind]})
    with pytest.raises(ConfigError, match="solutions that were just sampled"):
        check_demonstrations(cls(config, Setup(Sampling(8))), [], graded=True)


@pytest.mark.parametrize("host", HOSTS)
def test_what_an_expert_loss_remembers_is_in_the_checkpoint(host):
    config = ALGORITHMS[host].Config.model_validate({"type": host, "expert_loss": VARIANTS["glow"]})
    algorithm = ALGORITHMS[host](config, Setup(Sampling(8)))
    algorithm.expert_memory = {"p#0": 1.5}
    state = algorithm.state_dict()
    resumed = ALGORITHMS[host](config, Setup(Sampling(8)))
    resumed.load_state_dict(state)
    assert resumed.expert_memory == {"p#0": 1.5}
    assert resumed.state_dict() == state

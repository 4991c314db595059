"""Nuclear norm and sketch of each row's logits, through a real engine, against the full logits."""

import pytest
import torch
from rows import make_rows

from plait.algorithms import Setup
from plait.algorithms.sft import Sft, SftConfig
from plait.engine import row_sketch
from plait.engine.batch import collate
from plait.engine.config import LearnerConfig
from plait.engine.learner import LearnerWorker, Rank
from plait.engine.learners import InProcessRank, LearnerGroup
from plait.engine.types import Sampling

UDS = SftConfig.model_validate({"type": "sft", "data_selection": {"type": "uds"}})


def make_learners(model, **learner):
    algorithm = Sft(UDS, Setup(Sampling(16)))
    config = LearnerConfig.model_validate(learner)
    worker = LearnerWorker(str(model), config, algorithm.losses, algorithm.needs, Rank())
    return LearnerGroup(
        InProcessRank(worker),
        config,
        algorithm.needs,
        total_steps=1,
        seed=0,
        route=None,  # pyright: ignore[reportArgumentType]
    )


def sketched(model, batch, **learner):
    found = make_learners(model, **learner).annotate(batch, frozenset({"row_sketch"}), single=True)
    assert found.logit_norms is not None
    assert found.logit_sketches is not None
    return found.logit_norms, found.logit_sketches


@pytest.fixture(scope="module")
def batch():
    rows = make_rows("eeee")
    rows[2].weights[:] = 0  # nothing supervised
    return collate(rows)


@pytest.fixture(scope="module")
def logits(tiny_model, batch):
    """[n, V] of each row's supervised positions, from the plain model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    found = []
    for row in range(batch.num_rows):
        span = slice(*batch.row_starts[row : row + 2].tolist())
        with torch.no_grad():
            full = model(batch.input_ids[span][None]).logits[0]
        found.append(full[:-1][batch.trained[span][1:]].double())
    return found


@pytest.mark.parametrize(
    "learner",
    [{}, {"zero_stage": 3}, {"max_tokens_per_micro_batch": 20, "packing": False}],
    ids=["packed", "zero 3", "cut"],
)
def test_norm_and_sketch_are_those_of_the_full_logits(
    tiny_model, batch, logits, learner, monkeypatch
):
    monkeypatch.setattr(row_sketch, "COLUMNS_AT_ONCE", 100)
    norms, sketches = sketched(tiny_model, batch, **learner)
    assert norms.shape == (4,)
    assert sketches.shape == (4, row_sketch.SKETCH_SIZE)
    project = row_sketch.projection(logits[0].shape[1], torch.device("cpu")).double()
    for row, full in enumerate(logits):
        if row == 2:
            assert norms[row] == 0
            assert not sketches[row].any()
            continue
        norm = torch.linalg.svdvals(full).sum()
        torch.testing.assert_close(norms[row].double(), norm, atol=0, rtol=1e-4)
        sketch = full.mean(0) @ project
        torch.testing.assert_close(sketches[row].double(), sketch, atol=1e-4, rtol=0)


def test_the_norm_of_a_matrix_of_low_rank():
    torch.manual_seed(0)
    logits = torch.randn(30, 3, dtype=torch.float64) @ torch.randn(3, 50, dtype=torch.float64)
    norm = row_sketch.nuclear_norm(row_sketch.gram_matrix(logits))
    torch.testing.assert_close(norm, torch.linalg.svdvals(logits).sum(), atol=0, rtol=1e-5)


def test_sketches_keep_distances():
    torch.manual_seed(0)
    means = torch.randn(2, 5000)
    short = means @ row_sketch.projection(5000, torch.device("cpu"))
    ratio = (short[0] - short[1]).norm() / (means[0] - means[1]).norm()
    assert 0.75 < ratio < 1.25


def test_recorded_logprobs_are_recorded_where_one_step_takes_the_batch(tiny_model, batch):
    learners = make_learners(tiny_model)
    without = learners.annotate(batch, frozenset({"old_logprobs"}), single=True)
    assert without.old_logprobs is None
    found = learners.annotate(batch, frozenset({"recorded_logprobs"}), single=True)
    assert found.old_logprobs is not None

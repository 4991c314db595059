"""Frozen entries do not move by a bit, whatever the ZeRO stage; and a run resumes into the same masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rows import make_rows

from plait.algorithms import Setup
from plait.algorithms.chord import Chord, ChordConfig
from plait.engine.batch import collate, select
from plait.engine.config import LearnerConfig
from plait.engine.errors import CheckpointError, ConfigError
from plait.engine.learner import LearnerWorker, Rank
from plait.engine.parameter_selection import frozen_half, largest_entries, low_rank
from plait.engine.ray_ranks import RemoteLearner
from plait.engine.types import Sampling
from saved_state import save_state

RATE, COEFS, STEPS = 1e-2, {"mu": 0.4}, 3
ALGORITHM = Chord(ChordConfig(), Setup(Sampling(16)))
TYPES: dict[str, dict[str, Any]] = {
    "half": {"fraction": 0.5, "redraw_steps": 2},
    "gradient_magnitude": {"keep_fraction": 0.1},
    "principal_weights": {"rank": 4, "keep_fraction": 0.05, "refresh_steps": 2},
    "pattern": {
        "trainable": ["model.layers.1.mlp.*", "*norm.weight"],
        "neurons": {"model.layers.0.mlp.up_proj.weight": [0, 7]},
    },
    "lora": {"rank": 4, "train_a": False},
}
STAGES = [(0, "float32"), (1, "float32"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16")]


def config_of(kind, zero_stage=0, dtype="float32", **learner):
    selection = {"type": kind, **TYPES[kind]}
    return learner_config(selection, zero_stage=zero_stage, dtype=dtype, **learner)


def learner_config(selection=None, **learner):
    fields = {"learning_rate": RATE, "weight_decay": 0.1, "parameter_selection": selection}
    return LearnerConfig.model_validate(fields | learner)


def make_worker(model, config, seed=0):
    args = (str(model), config, ALGORITHM.losses, ALGORITHM.needs, Rank(), None, seed)
    return LearnerWorker(*args)


def batches(seed):
    return [collate(make_rows("ppee", seed))]


def masters(worker):
    """Full float32 master weights by name: what must not move even where bfloat16 would hide it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in worker.engine.module.model.named_parameters():
        full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        sharded = worker.config.zero_stage == 3
        with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
            found[name] = (parameter if full is None else full).detach().clone()
    return found


def sent(worker):
    return {name: weight.detach().clone() for name, weight in worker._full_weights()}


def mask_of(worker, weights):
    """bool by name, as the last step used it: this single rank holds every entry."""
    from plait.engine.master_weights import fragments

    if worker.engine.mask is None:
        trained = {n for n, p in worker.engine.module.model.named_parameters() if p.requires_grad}
        return {n: torch.full(w.shape, n in trained) for n, w in weights.items()}
    masks = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
    for part in fragments(worker.engine.deepspeed, 0):
        first, length = part.piece.first, part.piece.length
        held = part.of(worker.engine.mask._trained[part.master])
        masks[part.name].view(-1)[first : first + length] = held
    return masks


@pytest.mark.parametrize(("zero_stage", "dtype"), STAGES)
@pytest.mark.parametrize("kind", TYPES)
def test_frozen_entries_do_not_move_and_others_do(tiny_model, kind, zero_stage, dtype):
    worker = make_worker(tiny_model, config_of(kind, zero_stage, dtype))
    before = masters(worker)
    start = before
    for step in range(STEPS):
        metrics = worker.step(batches(step), "main", COEFS, RATE).metrics
        after, masks = masters(worker), mask_of(worker, before)
        for name, mask in masks.items():
            assert torch.equal(after[name][~mask], before[name][~mask]), (name, step)
        moved = sum(int((after[n] != before[n]).sum()) for n in after)
        chosen = sum(int(mask.sum()) for mask in masks.values())
        assert 0.5 * chosen < moved <= chosen
        if kind != "lora":
            total = sum(mask.numel() for mask in masks.values())
            assert moved < total
        if worker.engine.mask is not None:
            total = sum(m.numel() for n, m in masks.items() if n in names_with_gradient(worker))
            assert metrics["trained_share"] == pytest.approx(chosen / total)
        before = after
    weights = sent(worker)
    assert len(weights) == len(sent(make_worker(tiny_model, LearnerConfig())))
    if kind == "lora":
        assert all(torch.equal(before[n], start[n]) for n in before if "lora_B" not in n)
        assert any("lora_B" in n and not torch.equal(before[n], start[n]) for n in before)


def names_with_gradient(worker):
    return {n for n, p in worker.engine.module.model.named_parameters() if p.requires_grad}


def run(worker, first, last):
    for step in range(first, last):
        worker.step(batches(step), "main", COEFS, RATE)
    return sent(worker)


def assert_equal(one, other):
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize(("zero_stage", "dtype"), [(0, "float32"), (2, "bfloat16"), (3, "float32")])
@pytest.mark.parametrize("kind", TYPES)
def test_runs_are_equal_and_resume_between_two_choices(
    tiny_model, tmp_path, kind, zero_stage, dtype
):
    config = config_of(kind, zero_stage, dtype)
    reached = run(make_worker(tiny_model, config), 0, 5)
    worker = make_worker(tiny_model, config)
    run(worker, 0, 3)  # one step after the choice of step 2
    resumed = make_worker(tiny_model, config)
    resumed.load(save_state(worker, tmp_path))
    assert_equal(run(resumed, 3, 5), reached)
    assert_equal(run(worker, 3, 5), reached)


def test_the_masks_change_when_they_are_due(tiny_model):
    for kind, same in (("half", [0, 1]), ("principal_weights", [0, 1]), ("gradient_magnitude", [])):
        worker = make_worker(tiny_model, config_of(kind))
        seen = []
        for step in range(3):
            worker.step(batches(step), "main", COEFS, RATE)
            masks = mask_of(worker, masters(worker))
            seen.append(torch.cat([mask.flatten() for mask in masks.values()]))
        assert torch.equal(seen[0], seen[1]) == (same == [0, 1]), kind
        assert not torch.equal(seen[1], seen[2]), kind


def test_another_seed_freezes_another_half(tiny_model):
    one = run(make_worker(tiny_model, config_of("half"), seed=0), 0, 1)
    other = run(make_worker(tiny_model, config_of("half"), seed=1), 0, 1)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_everything_chosen_is_plain_training(tiny_model):
    everything = {"type": "pattern", "trainable": ["*"], "neurons": {"model.norm.weight": [0]}}
    masked = run(make_worker(tiny_model, learner_config(everything)), 0, 2)
    assert_equal(masked, run(make_worker(tiny_model, learner_config()), 0, 2))


def test_a_checkpoint_without_masks_is_refused(tiny_model, tmp_path):
    saved = save_state(make_worker(tiny_model, LearnerConfig()), tmp_path)
    with pytest.raises(CheckpointError, match="parameter_selection"):
        make_worker(tiny_model, config_of("half")).load(saved)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"trainable": ["model.layer.*"]}, "no parameter has it"),
        ({"neurons": {"model.norm.weight": [64]}}, "rows 0 to 63"),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused(tiny_model, fields, words):
    with pytest.raises(ConfigError, match=words):
        make_worker(tiny_model, learner_config({"type": "pattern", **fields}))


# -- rules ----------------------------------------------------------------------------------------


def test_half_is_balanced_over_blocks():
    shapes = {f"layers.{i}.w{j}": (2, 2) for i in range(3) for j in range(6)}
    shapes |= {f"layers.{i}.v{j}": (2,) for i in range(3) for j in range(2)}
    for seed in range(5):
        frozen = frozen_half(shapes, 0.5, seed)
        for i in range(3):
            assert sum(f".{i}.w" in name for name in frozen) == 3
            assert sum(f".{i}.v" in name for name in frozen) == 1
    alone = [len(frozen_half({"embed": (2, 2)}, 0.25, seed)) for seed in range(400)]
    assert 0.17 < sum(alone) / 400 < 0.33


def test_largest_entries_keeps_ties_and_leaves_out_zeros():
    values = torch.tensor([3.0, -5.0, 0.0, 3.0, 1.0])
    assert largest_entries(values, 0.4).tolist() == [True, True, False, True, False]
    assert largest_entries(values, 0.01).tolist() == [False, True, False, False, False]
    assert largest_entries(values, 1.0).tolist() == [True, True, False, True, True]
    assert not largest_entries(torch.zeros(4), 0.5).any()


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_low_rank_is_the_truncated_svd(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(low_rank(weight, 2), u[:, :2] * s[:2] @ v[:2], atol=1e-5, rtol=0)
    torch.testing.assert_close(low_rank(weight, 99), weight, atol=1e-5, rtol=0)


# -- two ranks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(ray_session):
    import ray

    class Probe(RemoteLearner):  # local, so that Ray ships it instead of importing this file
        """A learner actor that also hands out its full weights."""

        def weights(self):
            assert self.worker is not None
            return {name: weight.cpu().clone() for name, weight in self.worker._full_weights()}

    actor: Any = ray.remote(Probe).options(num_cpus=0)  # pyright: ignore[reportAttributeAccessIssue]
    workers: list[Any] = [actor.remote() for _ in range(2)]
    address, port = ray.get(workers[0].rendezvous.remote(), timeout=120)

    def train(model, config):
        ranks = [Rank(i, 2, address, port) for i in range(2)]
        args = (str(model), config, ALGORITHM.losses, ALGORITHM.needs)
        starts = [w.start.remote(*args, r) for w, r in zip(workers, ranks, strict=True)]
        ray.get(starts, timeout=300)
        seen = [ray.get([w.weights.remote() for w in workers], timeout=300)[0]]
        for step in range(STEPS):
            (batch,) = batches(step)
            parts = [[select(batch, [0, 2])], [select(batch, [1, 3])]]
            calls = zip(workers, parts, strict=True)
            ray.get(
                [w.call.remote("step", part, "main", COEFS, RATE) for w, part in calls], timeout=300
            )
            seen.append(ray.get([w.weights.remote() for w in workers], timeout=300)[0])
        return seen

    yield train
    for worker in workers:
        ray.kill(worker)


@pytest.mark.parametrize("kind", ["half", "gradient_magnitude", "principal_weights", "pattern"])
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_ranks_change_the_entries_that_one_does(tiny_model, two_ranks, kind, zero_stage):
    seen = two_ranks(tiny_model, config_of(kind, zero_stage, num_workers=2, num_cpus=1))
    worker = make_worker(tiny_model, config_of(kind, zero_stage))
    alone = [sent(worker)]
    for step in range(STEPS):
        worker.step(batches(step), "main", COEFS, RATE)
        alone.append(sent(worker))
    for before, after, old, new in zip(seen, seen[1:], alone, alone[1:], strict=False):
        moved = {name: after[name] != before[name] for name in after}
        expected = {name: new[name] != old[name] for name in new}
        different = sum(int((moved[name] != expected[name]).sum()) for name in moved)
        # Sums of two ranks differ in the last bit, so an entry at the very threshold may change sides.
        assert different <= 0.002 * sum(mask.numel() for mask in moved.values())
        assert any(bool((~mask).any()) for mask in moved.values())

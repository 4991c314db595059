"""`plait check golden`: recompute reference numbers with the functions that train, in float64.

Format: JSON `{"schema": 1, "cases": [...]}`; kinds loss, advantage, schedule and trace. A loss case is one minibatch
whose logits are given, so everything between sampled text and gradient is exercised except the model itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..algorithms import AlgorithmBase, Setup, hpt, polychromic, resolve, super_rl
from ..algorithms.advantages import uniform_groups
from ..engine.batch import collate, select
from ..engine.errors import ConfigError, DataError
from ..engine.model import token_statistics
from ..engine.probes import GradientComparison
from ..engine.types import PolicyOutput, Sampling, TrainBatch, UpdateReport
from .golden_case import overridden, read_case
from .golden_critic import run_value_loss, token_advantages
from .golden_expert import (
    CaseError,
    check_columns,
    remembered,
    trace_expert_loss,
    with_expert_columns,
)
from .golden_pairs import input_trace, normalizers
from .golden_prefix import PREFIX_TRACES, recorded_entropy, token_samples
from .golden_rounds import ROUND_TRACES
from .golden_rows import column, row_sample, scored_sample, with_columns
from .golden_selection import trace_selection

SCHEMA = 1
TOLERANCE = 1e-6
Case = Mapping[str, Any]


@dataclass(frozen=True)
class CaseResult:
    """One line of the report; `problem` says what is missing or unknown."""

    algorithm: str
    variant: str
    name: str
    kind: str
    max_abs_err: float
    ok: bool
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        error = self.max_abs_err if isfinite(self.max_abs_err) else None
        return {**asdict(self), "max_abs_err": error}

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"FAIL {self.problem}".rstrip()
        fields = (
            self.algorithm,
            self.variant,
            self.name,
            self.kind,
            f"{self.max_abs_err:.3g}",
            verdict,
        )
        return " ".join(fields)


def check_file(path: Path, algorithms: Sequence[str] | None = None) -> Iterator[CaseResult]:
    """Check every case of a file (of the named algorithms only). Raises DataError if it is no golden file."""
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a golden file: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise DataError(
            f'{path}: not a golden file: expected {{"schema": {SCHEMA}, "cases": [...]}}'
        )
    if not isinstance(content.get("cases"), list):
        raise DataError(f"{path}: not a golden file: `cases` must be a list")
    for case in content["cases"]:
        if algorithms is None or named(case, "algorithm") in algorithms:
            yield check_case(case)


# What reading a value of the wrong type or size raises: reported as that case's failure, the file goes on.
MALFORMED = (
    ArithmeticError,
    AttributeError,
    ConfigError,
    DataError,
    LookupError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)


def check_case(case: Case) -> CaseResult:
    """Compute one case and compare every expected number."""
    error, problem = float("inf"), ""
    try:
        known = read_case(case)
        if known["kind"] not in KINDS:
            raise CaseError(f"unknown kind {known['kind']!r}; known: {', '.join(KINDS)}")
        produced = KINDS[known["kind"]](known)
        error, problem = compare(
            known["expect"], produced, known.get("tolerance", TOLERANCE), path=""
        )
    except MALFORMED as failure:
        lines = f"{type(failure).__name__}: {failure}".splitlines()
        problem = " ".join(line.strip() for line in lines)
    names = (named(case, key) for key in ("algorithm", "variant", "name", "kind"))
    return CaseResult(*names, max_abs_err=error, ok=not problem, problem=problem)


def named(case: Any, key: str) -> str:
    """The text under a key of a case that may have any shape; empty where there is none."""
    value = case.get(key) if isinstance(case, Mapping) else None
    return value if isinstance(value, str) else ""


def compare(want: Any, got: Any, tolerance: float, path: str) -> tuple[float, str]:
    """Largest absolute error and the first thing off; floats within tolerance x (1 + |want|), the rest exact."""
    if isinstance(want, Mapping):
        if not isinstance(got, Mapping):
            return float("inf"), f"{path or 'result'}: expected a mapping, got {got!r}"
        missing = [key for key in want if key not in got]
        if missing:
            return float("inf"), f"{path}{missing[0]}: not produced"
        pairs = [(want[key], got[key], f"{path}{key}.") for key in want]
    elif isinstance(want, list):
        if not isinstance(got, Sequence) or isinstance(got, str) or len(got) != len(want):
            return float("inf"), f"{path.rstrip('.')}: expected {len(want)} entries, got {got!r}"
        pairs = [(w, g, f"{path}{i}.") for i, (w, g) in enumerate(zip(want, got, strict=True))]
    else:
        return compare_leaf(want, got, tolerance, path.rstrip("."))
    worst, problem = 0.0, ""
    for w, g, where in pairs:
        error, found = compare(w, g, tolerance, where)
        worst, problem = max(worst, error), problem or found
    return worst, problem


def compare_leaf(want: Any, got: Any, tolerance: float, path: str) -> tuple[float, str]:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (want, got))
    if numbers and (isinstance(want, float) or isinstance(got, float)):
        error = abs(got - want)
        ok = error <= tolerance * (1 + abs(want))
        return (error, "") if ok else (error, f"{path}: expected {want!r}, got {got!r}")
    same = want == got and isinstance(want, bool) == isinstance(got, bool)
    return (0.0, "") if same else (float("inf"), f"{path}: expected {want!r}, got {got!r}")


# -- kinds -------------------------------------------------------------------------------------


def build(case: Case) -> AlgorithmBase:
    """The case's algorithm with its config; what the config leaves out takes the algorithm's default."""
    cls = resolve(case["algorithm"])
    config = cls.Config.model_validate({"type": case["algorithm"], **case.get("config", {})})
    return cls(config, Setup(Sampling(max_tokens=config.max_response_length)))


def run_loss(case: Case) -> dict[str, Any]:
    """Credit, finish, loss and gradient of one minibatch, whole or in the case's micro-batches."""
    algorithm = build(case)
    rows, update = case["rows"], case.get("update", "main")
    if update not in algorithm.losses:
        raise CaseError(
            f"{case['algorithm']} has no loss {update!r}; it has {list(algorithm.losses)}"
        )
    if "new_values" in algorithm.needs[update]:
        return run_value_loss(case, algorithm, update)
    check_columns(rows, algorithm, update)
    samples = algorithm.credit([row_sample(row, f"row {i}") for i, row in enumerate(rows)])
    batch = with_columns(collate(samples, torch.float64), rows, algorithm.needs[update])
    if "behaviour_logprobs" in algorithm.needs[update]:
        batch = replace(batch, behaviour_logprobs=column(rows, "old_logprobs"))
    if "old_entropy" in algorithm.needs[update]:
        batch = replace(batch, old_entropy=recorded_entropy(rows, batch))
    batch = algorithm.finish(batch)
    scheduled = algorithm.update(samples, algorithm.coefs(case.get("step", 0))).coefs
    coefs = overridden(scheduled, case)
    logits = [
        torch.tensor(row.get("logits", []), dtype=torch.float64, requires_grad=True) for row in rows
    ]
    # Something to differentiate even where no row has a token.
    loss = torch.zeros((), dtype=torch.float64, requires_grad=True)
    metrics = dict[str, Tensor]()
    with torch.no_grad():
        everything = policy_output(logits, batch)
    algorithm.expert_memory = remembered(rows) | normalizers(rows)
    batch = algorithm.prepare(batch, everything.logprobs, coefs)
    for part in case.get("micro_batches", [list(range(len(rows)))]):
        micro_batch = select(batch, part)
        out = policy_output([logits[i] for i in part], micro_batch)
        if "token_samples" in algorithm.needs[update]:
            chosen = [logits[i] for i in part], [rows[i] for i in part]
            out = replace(out, samples=token_samples(*chosen, micro_batch, algorithm))
        out = with_expert_columns(
            out, micro_batch, [logits[i] for i in part], [rows[i] for i in part], algorithm
        )
        result = algorithm.losses[update](out, micro_batch, coefs)
        loss = loss + result.loss
        for name, value in result.metrics.items():
            metrics[name] = metrics.get(name, torch.zeros(())) + value
    loss.backward()
    starts = batch.row_starts.tolist()
    advantages = (batch.advantages * (batch.weights != 0)).tolist()
    return {
        "loss": loss.item(),
        "grad_logits": [
            (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).tolist() for leaf in logits
        ],
        "advantages": [advantages[starts[i] + 1 : starts[i + 1]] for i in range(len(rows))],
        "metrics": {**{name: value.item() for name, value in metrics.items()}, **coefs},
    }


def policy_output(logits: Sequence[Tensor], batch: TrainBatch) -> PolicyOutput:
    """What the model would return: float64 [T], 0 on the row's context token."""
    empty = batch.advantages.new_zeros(0)
    columns = [(empty, empty)]
    for i, leaf in enumerate(logits):
        start, end = batch.row_starts[i : i + 2].tolist()
        zero = leaf.new_zeros(1)
        if end - start == 1:
            columns.append((zero, zero))
            continue
        logprobs, entropy = token_statistics(leaf, batch.targets[start + 1 : end])
        columns.append((torch.cat([zero, logprobs]), torch.cat([zero, entropy])))
    logprobs, entropies = zip(*columns, strict=True)
    trained = batch.trained
    return PolicyOutput(
        torch.cat(logprobs).where(trained, 0.0), torch.cat(entropies).where(trained, 0.0)
    )


def run_advantage(case: Case) -> dict[str, Any]:
    """One advantage a row; one a token, with its return, where the algorithm has a critic."""
    algorithm = build(case)
    if "values" in algorithm.needs["main"]:
        return token_advantages(case, algorithm)
    samples = [scored_sample(row) for row in case["rows"]]
    return {"advantages": [float(s.advantages[-1]) for s in algorithm.credit(samples)]}


def run_schedule(case: Case) -> dict[str, Any]:
    algorithm = build(case)
    names = list(case["expect"])
    known = list(algorithm.coefs(0))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise CaseError(f"{case['algorithm']} schedules no {unknown[0]!r}; it has {known}")
    coefs = [algorithm.coefs(step) for step in case["steps"]]
    return {name: [values[name] for values in coefs] for name in names}


def run_trace(case: Case) -> dict[str, Any]:
    """Decisions over several steps, by the algorithm's own tracer."""
    algorithm = build(case)
    if case["algorithm"] == "sft":
        selects = algorithm.config.data_selection is not None
        trace = trace_selection if selects else input_trace(algorithm) or trace_expert_loss
        return {"outputs": trace(algorithm, case["inputs"])}
    tracer = TRACES.get(case["algorithm"])
    if tracer is None:
        raise CaseError(f"{case['algorithm']} has no trace; known: {', '.join(TRACES)}")
    return {"outputs": [tracer(algorithm, entry) for entry in case["inputs"]]}


def trace_kept_groups(algorithm: Any, entry: Case) -> dict[str, Any]:
    """Groups that stay when `drop_uniform_groups` removes those without signal."""
    names = [name for name, _ in entry["rewards"]]
    flat = [(reward, name) for name, rewards in entry["rewards"] for reward in rewards]
    dropped = uniform_groups([r for r, _ in flat], [n for _, n in flat])
    return {
        "kept": [n for n in names if not (algorithm.config.drop_uniform_groups and n in dropped)]
    }


def trace_hpt(algorithm: Any, entry: Case) -> dict[str, Any]:
    """Right rollouts and the route of each prompt."""
    threshold = algorithm.config.success_threshold
    solved = {name: hpt.count_solved(rewards, threshold) for name, rewards in entry["rewards"]}
    routes = {
        name: hpt.choose_route(rewards, algorithm.config) for name, rewards in entry["rewards"]
    }
    return {"solved": solved, "routes": routes}


def trace_super_rl(algorithm: Any, entry: Case) -> dict[str, Any]:
    """The route of each prompt."""
    config = algorithm.config
    return {
        "routes": {n: super_rl.choose_route(rewards, config) for n, rewards in entry["rewards"]}
    }


def trace_polychromic(algorithm: Any, entry: Case) -> dict[str, Any]:
    """The sets of one group and what its rows get of them; without given sets, all there are."""
    rewards, size = entry["rewards"], algorithm.config.set_size
    sets = entry["sets"]
    if sets is None:
        sets = polychromic.all_sets(len(rewards), size)
    found = polychromic.credit_sets(rewards, entry["signatures"], sets, size)
    return {
        "objectives": found.objectives,
        "set_advantages": found.set_advantages,
        "advantages": found.advantages,
    }


def trace_amft(algorithm: Any, entry: Case) -> dict[str, Any]:
    """One step of the controller."""
    algorithm.open_step()
    algorithm.entropy_target = entry["entropy_target"]
    if entry["validation_grad"] is not None:
        names = ("validation", "sft", "rl")
        vectors = np.array([entry[f"{name}_grad"] for name in names])
        gram = tuple(map(tuple, (vectors @ vectors.T).tolist()))
        algorithm.observe_gradients(GradientComparison(names, gram, ({}, {}, {})))
    metrics = {"policy_entropy": entry["entropy"]}
    algorithm.observe(UpdateReport("main", 0.0, metrics, entry["learning_rate"]))
    return {"meta_gradient": algorithm.meta_gradient, "mu": algorithm.mu}


TRACES: dict[str, Callable[[Any, Case], dict[str, Any]]] = {
    "amft": trace_amft,
    "grpo": trace_kept_groups,
    "hpt": trace_hpt,
    "polychromic": trace_polychromic,
    "super_rl": trace_super_rl,
    **PREFIX_TRACES,
    **ROUND_TRACES,
}
KINDS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "loss": run_loss,
    "advantage": run_advantage,
    "schedule": run_schedule,
    "trace": run_trace,
}

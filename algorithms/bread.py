"""BREAD: where a prompt fails, its group branches off from an expert anchor (arXiv 2506.17211).

Objective: grpo's, over POLICY tokens; the forced tokens of an anchor are in no component.

A demonstration is cut into at most `max_pieces` pieces. When all rollouts of a prompt are known to fail, a bisection
over the number of pieces, with `probe_rollouts` rollouts each, looks for a prefix that the policy sometimes completes:
no success, more pieces; success only, fewer; both, that is the anchor. The whole group is then drawn from it and takes
the place of the failed one. The last piece, and pieces beyond the response budget, are never forced.

Where the paper leaves this open: the search procedure is ours. A probe without any known score ends the search, and the
group stays as it was; so it does where there is no demonstration, or one of a single piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from statistics import fmean
from typing import Literal

import numpy as np
from pydantic import Field

from ..engine.contracts import DrawFn
from ..engine.ledger import ExpertLedger
from ..engine.types import (
    Demonstration,
    RolloutGroup,
    RolloutRequest,
    Sample,
    Source,
    StepPlan,
    Update,
)
from .base import PolicyFields, Setup
from .grpo import GrpoBase
from .losses import Normalizer
from .rounds import groups_by_prompt, has_failed
from .rows import rollout_rows
from .step_size import StepSize


class BreadConfig(PolicyFields):
    type: Literal["bread"] = "bread"
    probe_rollouts: int = Field(default=4, ge=1)
    max_pieces: int = Field(default=16, ge=1)
    """Pieces of a demonstration (E); neighbouring ones are merged down to this number."""
    failure_threshold: float = 0.0
    """A rollout succeeded when its reward is above this."""
    normalizer: Normalizer = "rows"


@dataclass(frozen=True)
class Search:
    """Where a search stands: the numbers of pieces probed so far, the next one included, and its result."""

    probes: tuple[int, ...]
    pieces: int | None
    """Pieces to force, 0 for none; None while the last of `probes` is still to be measured."""


def search_anchor(rates: Sequence[float | None], num_pieces: int) -> Search:
    """Bisection for the shortest useful prefix, replayed from the success rates of its probes in order.

    A rate of None (no known score) ends it without an anchor.
    """
    low, high, probes = 0, num_pieces, list[int]()
    while high - low > 1:
        middle = (low + high) // 2
        probes.append(middle)
        if len(probes) > len(rates):
            return Search(tuple(probes), None)
        rate = rates[len(probes) - 1]
        if rate is None:
            return Search(tuple(probes), 0)
        if 0 < rate < 1:
            return Search(tuple(probes), middle)
        low, high = (middle, high) if rate == 0 else (low, middle)
    return Search(tuple(probes), min(high, num_pieces - 1))


def merge_pieces(piece_lengths: Sequence[int], max_pieces: int) -> tuple[int, ...]:
    """Token counts of at most `max_pieces` runs of neighbouring pieces, as equal in number as possible."""
    num = min(max_pieces, len(piece_lengths))
    cuts = [k * len(piece_lengths) // num for k in range(num + 1)] if num else []
    return tuple(sum(piece_lengths[a:b]) for a, b in pairwise(cuts))


class Bread(GrpoBase):
    Config = BreadConfig
    extra_needs = frozenset({"demonstrations"})

    def __init__(self, config: BreadConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self._seen: dict[str, float] = {}
        self._ledger = ExpertLedger()

    def follow_up(
        self, rounds: Sequence[Sequence[RolloutGroup]], step: int, draw: DrawFn
    ) -> Sequence[RolloutRequest]:
        """The next probe, or the anchored group, of every prompt whose own rollouts failed."""
        by_prompt = groups_by_prompt(group for groups in rounds for group in groups)
        requests = [self.next_request(groups) for groups in by_prompt]
        return [request for request in requests if request is not None]

    def next_request(self, groups: Sequence[RolloutGroup]) -> RolloutRequest | None:
        """`groups`: the prompt's own, those of its probes in order, and the anchored one."""
        search = self.search(groups)
        if search.pieces is None:
            pieces, n = search.probes[-1], self.config.probe_rollouts
        elif search.pieces > 0 and len(groups) == 1 + len(search.probes):
            pieces, n = search.pieces, self.config.rollouts_per_prompt
        else:
            return None
        prompt = groups[0].prompt
        demonstration = prompt.demonstrations[0]
        prefix = demonstration.token_ids[: self.anchors(demonstration)[pieces]]
        return RolloutRequest(prompt, n, self.setup.sampling, prefix)

    def search(self, groups: Sequence[RolloutGroup]) -> Search:
        """Where the search of one prompt stands; over before it began where the prompt did not fail."""
        own, *probes = groups
        failed = has_failed(own, self.config.failure_threshold)
        if not failed or not own.prompt.demonstrations:
            return Search((), 0)
        num_pieces = len(self.anchors(own.prompt.demonstrations[0]))
        return search_anchor([self.success_rate(group) for group in probes], num_pieces)

    def success_rate(self, group: RolloutGroup) -> float | None:
        """Share of known scores above the threshold; None where none is known."""
        threshold = self.config.failure_threshold
        return fmean(r > threshold for r in group.rewards) if group.rewards else None

    def anchors(self, demonstration: Demonstration) -> list[int]:
        """Tokens of the first k pieces, k = 0 to E - 1, as far as they leave a token of the response budget."""
        pieces = merge_pieces(demonstration.piece_lengths, self.config.max_pieces)
        lengths = accumulate(pieces[:-1], initial=0)
        return [length for length in lengths if length < self.setup.sampling.max_tokens]

    def assemble(
        self, plan: StepPlan, groups: Sequence[RolloutGroup], step: int
    ) -> Sequence[Update]:
        """Each prompt trains its anchored group where there is one, else its own."""
        by_prompt = groups_by_prompt(groups)
        searches = [self.search(own) for own in by_prompt]
        anchored = [one[-1] for one, s in zip(by_prompt, searches, strict=True) if s.pieces]
        self._seen = {"probes": float(sum(len(search.probes) for search in searches))}
        if by_prompt:
            self._seen["anchored_share"] = len(anchored) / len(by_prompt)
        if anchored:
            self._seen["prefix_share"] = fmean(prefix_share(group) for group in anchored)
        self._ledger = ExpertLedger(
            gate_rate=self._seen.get("anchored_share"),
            used=frozenset(group.prompt.prompt_id for group in anchored),
            unused={
                own.prompt.prompt_id: "no_anchor" if search.probes else "solved"
                for (own, *_), search in zip(by_prompt, searches, strict=True)
                if own.rewards and not search.pieces
            },
        )
        kept = [one[-1] if s.pieces else one[0] for one, s in zip(by_prompt, searches, strict=True)]
        return [self.update(self.credit(rollout_rows(kept)), self.coefs(step))]

    def credit(self, samples: Sequence[Sample]) -> list[Sample]:
        """Group advantages; forced tokens have weight 0."""
        rows = super().credit(samples)
        return [
            replace(row, weights=np.where(row.source == Source.EXPERT, 0, row.weights))
            for row in rows
        ]

    def ledger(self, updates: Sequence[Update], step: int) -> ExpertLedger:
        """Gate: prompts that train an anchored group; the anchor itself has weight 0."""
        return self._ledger

    def step_size(self, num_prompts: int, step: int) -> StepSize:
        """Every prompt fails, and its search takes all probes."""
        size = super().step_size(num_prompts, step)
        if self.config.max_pieces == 1:
            return size
        probes = (self.config.max_pieces - 1).bit_length()
        rollouts = 2 * size.rollouts + num_prompts * probes * self.config.probe_rollouts
        return replace(size, rollouts=rollouts, rounds=2 + probes)

    def metrics(self) -> Mapping[str, float]:
        """Of the last step: probes, share of anchored groups, and the share of the demonstration they were given."""
        return self._seen


def prefix_share(group: RolloutGroup) -> float:
    return group.rollouts[0].prefix_len / len(group.prompt.demonstrations[0].token_ids)

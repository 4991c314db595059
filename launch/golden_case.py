"""The shape of a golden case: known keys, one entry a response token, token ids inside the vocabulary.

A case that breaks it is reported as failed before anything is computed. A key that is null means the same as none, so
`read_case` leaves such keys out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Name = Annotated[str, StringConstraints(min_length=1)]
Values = list[float]
PER_TOKEN = (
    "logits",
    "old_logprobs",
    "rollout_logprobs",
    "ref_logprobs",
    "values",
    "new_values",
    "returns",
    "samples",
    "token_weights",
    "old_entropy",
    "ref_logits",
    "teacher_logprobs",
    "base_logprobs",
    "history_logprobs",
    "prompt_attention",
)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GoldenRow(Strict):
    """One row. Where `response_ids` is left out (kind `advantage`), nothing else is counted against it."""

    source: Literal["policy", "expert", "hybrid"]
    group: Name
    reward: float | None = None
    response_ids: list[Annotated[int, Field(ge=0)]] | None = None
    prefix_len: Annotated[int, Field(ge=0)] | None = None
    logits: list[Values] | None = None
    old_logprobs: Values | None = None
    rollout_logprobs: Values | None = None
    ref_logprobs: Values | None = None
    values: Values | None = None
    new_values: Values | None = None
    returns: Values | None = None
    samples: list[list[Annotated[int, Field(ge=0)]]] | None = None
    token_weights: list[Annotated[float, Field(ge=0)]] | None = None
    old_entropy: Values | None = None
    signature: Any = None
    ref_logits: list[Values] | None = None
    teacher_logprobs: Values | None = None
    pair: Literal["chosen", "rejected"] | None = None
    base_logprobs: Values | None = None
    history_logprobs: Values | None = None
    prompt_attention: Values | None = None
    sample_id: Name | None = None
    previous_loss: float | None = None
    log_normalizer: float | None = None

    @model_validator(mode="after")
    def _one_entry_a_response_token(self) -> GoldenRow:
        if self.response_ids is None:
            return self
        n = len(self.response_ids)
        for name in PER_TOKEN:
            column = getattr(self, name)
            if column is not None and len(column) != n:
                raise ValueError(f"{name} has {len(column)} entries for {n} response_ids")
        if self.prefix_len is not None and self.prefix_len > n:
            raise ValueError(f"prefix_len = {self.prefix_len} exceeds the {n} response_ids")
        if self.prefix_len is None and self.source == "hybrid":
            raise ValueError("a hybrid row needs prefix_len")
        return self

    @model_validator(mode="after")
    def _ids_are_inside_the_vocabulary(self) -> GoldenRow:
        sizes = {len(vector) for vector in self.logits or []}
        if len(sizes) > 1:
            raise ValueError(f"logits have vectors of {sorted(sizes)} entries; give them one size")
        ids = [*(self.response_ids or []), *(i for drawn in self.samples or [] for i in drawn)]
        if sizes and ids and max(ids) >= min(sizes):
            raise ValueError(f"token id {max(ids)} is outside the {min(sizes)} logits")
        return self


class GoldenCase(Strict):
    """One case of any kind; which keys a kind needs is its own business."""

    name: Name
    kind: Name
    algorithm: Name
    variant: str | None = None
    config: dict[str, Any] | None = None
    tolerance: Annotated[float, Field(ge=0)] | None = None
    expect: Annotated[dict[str, Any], Field(min_length=1)]
    step: Annotated[int, Field(ge=0)] | None = None
    coefs: dict[str, float] | None = None
    update: Name | None = None
    rows: list[GoldenRow] | None = None
    micro_batches: list[list[int]] | None = None
    steps: list[Annotated[int, Field(ge=0)]] | None = None
    inputs: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _micro_batches_split_the_rows(self) -> GoldenCase:
        if self.micro_batches is None:
            return self
        named = sorted(row for part in self.micro_batches for row in part)
        if named != list(range(len(self.rows or []))):
            raise ValueError(
                f"micro_batches name rows {named}; name each of the {len(self.rows or [])} rows once"
            )
        return self

    @model_validator(mode="after")
    def _expected_rows_have_logits(self) -> GoldenCase:
        if self.kind == "loss" and self.update != "critic":
            for i, row in enumerate(self.rows or []):
                if row.response_ids and row.logits is None:
                    raise ValueError(f"row {i} has no logits; the loss needs them")
        return self


def read_case(case: Mapping[str, Any]) -> dict[str, Any]:
    """The case without its null keys. Raises ValidationError where its shape is not a golden case's."""
    GoldenCase.model_validate(case)
    kept = without_nulls(case)
    kept["expect"] = without_nulls(kept["expect"])
    if "rows" in kept:
        kept["rows"] = [without_nulls(row) for row in kept["rows"]]
    return kept


def without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def overridden(scheduled: Mapping[str, float], case: Mapping[str, Any]) -> dict[str, float]:
    """The coefficients with those that the case gives. Raises ValueError for one that the algorithm does not have."""
    given = case.get("coefs", {})
    unknown = sorted(set(given) - set(scheduled))
    if unknown:
        raise ValueError(
            f"{case['algorithm']} has no coefficient {unknown[0]!r}; it has {list(scheduled)}"
        )
    return {**scheduled, **given}

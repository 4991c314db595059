"""Where every row of a data set went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

IDS_SHOWN = 5


@dataclass(frozen=True)
class DataReport:
    """Where every row went: `rows == kept + held_out + sum(dropped.values())`."""

    rows: int
    kept: int
    """Training prompts."""
    held_out: int
    with_demonstration: int
    """Training prompts of the expert stream."""
    dropped: Mapping[str, int]
    """Rows by reason."""
    first_dropped: Mapping[str, Sequence[str]]
    """The first ids by reason, with what was wrong."""
    long_demonstrations: int
    """Demonstrations of training prompts beyond max_response_length: kept, algorithms cut them."""
    refused_demonstrations: int
    """Demonstrations left out because they hold a control token; their prompts are kept."""
    with_pair: int = 0
    """Training prompts with a demonstration and a rejected response."""
    refused_rejected: int = 0
    """Rejected responses left out because they hold a control token."""

    def __str__(self) -> str:
        lines = [
            f"{self.rows} rows: {self.kept} to train on ({self.with_demonstration} with a "
            f"demonstration), {self.held_out} held out, {sum(self.dropped.values())} dropped"
        ]
        for reason, count in self.dropped.items():
            lines.append(f"  {count} {reason}: {'; '.join(self.first_dropped[reason])}")
        if self.long_demonstrations:
            lines.append(
                f"  {self.long_demonstrations} demonstrations exceed rollouts.max_response_length"
            )
        if self.refused_demonstrations:
            lines.append(f"  {self.refused_demonstrations} demonstrations hold a control token")
        if self.with_pair:
            lines.append(f"  {self.with_pair} of them with a rejected response")
        if self.refused_rejected:
            lines.append(f"  {self.refused_rejected} rejected responses hold a control token")
        return "\n".join(lines)

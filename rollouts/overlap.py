"""How much of a training prompt's text is in the held-out prompts: n-grams of words, hashed.

A word is what white space separates, in NFKC form, case folded, without punctuation at its ends (GPT-3, arXiv
2005.14165, appendix C, which also uses 13-grams). Operators are words, so `9 + 4` is not `9 - 4`. A text of fewer words
is one n-gram. n-grams that more than COMMON training prompts have are the wording of a template and say nothing.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..engine.types import Prompt

NGRAM = 13
COMMON = 10
_EDGES = ".,;:!?\"'()[]"
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Overlap:
    prompt_id: str
    share: float
    """Of the prompt's n-grams, those that some held-out prompt has too."""
    held_out: str
    """A held-out prompt with one of them."""


def words(prompt: Prompt) -> list[str]:
    """Of all turns but the system's."""
    said = (m["content"] for m in prompt.messages if m["role"] not in ("system", "developer"))
    folded = unicodedata.normalize("NFKC", " ".join(said)).casefold()
    return [word.strip(_EDGES) or word for word in folded.split()]


def hash_ngrams(words: list[str], n: int = NGRAM) -> np.ndarray:
    """u64, one for each window of `n` words; of fewer words, one for all of them."""
    n = min(n, len(words))
    hashes = np.array([hash(word) for word in words], dtype=np.int64).view(np.uint64)
    found = np.full(len(words) - n + 1, n, dtype=np.uint64)
    for i in range(n):  # wraps around, as meant
        found = found * _FACTOR + hashes[i : i + len(found)]
        found ^= found >> np.uint64(29)
    return np.unique(found)


class HeldOutText:
    """The n-grams of the held-out prompts, and which training prompts have some of them."""

    def __init__(self, held_out: Iterable[Prompt]) -> None:
        self._owner: dict[int, str] = {}
        for prompt in held_out:
            for ngram in hash_ngrams(words(prompt)).tolist():
                self._owner.setdefault(ngram, prompt.prompt_id)
        self._ngrams = np.array(sorted(self._owner), dtype=np.uint64)
        self._seen: dict[int, list[str]] = {}
        self._shares: dict[str, float] = {}

    def add(self, prompt: Prompt) -> Overlap | None:
        """An Overlap of share 1 where all of the training prompt's n-grams are held out; less is known at the end."""
        if not len(self._ngrams):
            return None
        own = hash_ngrams(words(prompt))
        common = own[np.isin(own, self._ngrams)].tolist()
        if len(common) == len(own):
            return Overlap(prompt.prompt_id, 1.0, self._owner[common[0]])
        for ngram in common:
            seen = self._seen.setdefault(ngram, [])
            if len(seen) <= COMMON:
                seen.append(prompt.prompt_id)
                self._shares[prompt.prompt_id] = len(common) / len(own)
        return None

    def partial(self) -> Iterator[Overlap]:
        """Prompts that share part of their n-grams, one at least that is no wording of a template."""
        first: dict[str, int] = {}
        for ngram, prompts in self._seen.items():
            if len(prompts) <= COMMON:
                for prompt_id in prompts:
                    first.setdefault(prompt_id, ngram)
        for prompt_id, ngram in first.items():
            yield Overlap(prompt_id, self._shares[prompt_id], self._owner[ngram])

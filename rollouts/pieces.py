"""Where a written solution may be cut: after line ends and sentence ends, always between two tokens.

A solution is cut in its token ids, never in its text, so that the first pieces of a demonstration are a prefix of the
demonstration's own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTENCE_END = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
CLOSING = "\"')]}*\u201d\u2019"


class Pieces:
    """Piece lengths under one tokenizer. What a token says is looked up once for each token id."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text = str(tokenizer.decode(self._anchor))
        self._texts: dict[int, str] = {}

    def lengths(self, ids: Sequence[int]) -> list[int]:
        """Tokens of each piece; their sum is len(ids).

        A sentence ends with one of . ! ? before white space, so `3.14` is not cut. White space alone is no piece.
        """
        texts = [self._text(token) for token in ids]
        lengths: list[int] = []
        start, blank = 0, True
        for i, text in enumerate(texts):
            blank = blank and not text.strip()
            following = texts[i + 1] if i + 1 < len(texts) else " "
            if i + 1 < len(texts) and (blank or not _ends(text, following)):
                continue
            if blank and lengths:
                lengths[-1] += i + 1 - start
            else:
                lengths.append(i + 1 - start)
            start, blank = i + 1, True
        return lengths

    def _text(self, token: int) -> str:
        """What the token adds after another one: with its leading white space, which `decode` alone may drop."""
        if token not in self._texts:
            text = str(self._tokenizer.decode([*self._anchor, token]))
            self._texts[token] = text.removeprefix(self._anchor_text)
        return self._texts[token]


def _ends(text: str, following: str) -> bool:
    """Whether a piece ends after `text`; line ends belong to the line they close."""
    if following and not following.strip() and "\n" in following:
        return False
    if "\n" in text:
        return True
    words = text.rstrip()
    spaced = len(words) < len(text) or following[:1].isspace()
    return spaced and words.rstrip(CLOSING).endswith(SENTENCE_END)

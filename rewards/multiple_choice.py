r"""Reward `multiple_choice`: 1 when the completion chooses the prompt's option, else 0.

`prompt.answer` is a letter ("B", "(B)", "b.") or the text of one of `prompt.metadata["choices"]`, a list of the
options' texts in the order of their letters. Without choices any letter from A to Z can be the answer.

Which option a completion chooses, first rule that finds one:

1. the content of its last closed \boxed{...};
2. the content of its last <answer>...</answer>;
3. what follows the last "answer is", "answer:", "option is", "choice:" and the like;
4. its last line.

There, a letter is read in upper or lower case where it stands alone ("B", "(b)", "**B**", "B."), or in upper case
before the option ("B) Paris", "B: Paris", "(B) Paris"), and a choice's own text where nothing else stands beside it;
case, white space and closing punctuation do not count. Behind "answer is" more may follow: "The answer is B because
..."; "A" and "I" followed by a word are then taken for words. In the last line exactly one "(B)" among other words
counts as well.

Ambiguous is wrong: two letters in one place ("A or C", "(B), not (C)"), a letter whose own text is another's ("B)
Rome" where Rome is C), a text that two choices share, a letter beyond the last choice. An earlier statement never
counts where a later one of the same rule exists: that is a correction.

UNKNOWN where the answer is missing or names no option, or `choices` is no list of texts. The score's own `answer` is
the letter chosen, "" where there is none.
"""

import re
from collections.abc import Sequence

from ..engine.types import Prompt, Score
from .answers import last_boxed, last_tagged, plain

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARK = re.compile(
    r"\b(?:answer|option|choice)\b(?:\*\*)?(?:\s+is\b|\s?[:=])(?:\*\*)?:?", re.IGNORECASE
)
_ALONE = re.compile(r"[\s*_$`'\"(]*+([A-Za-z])[\s*_$`'\".,:;)]*+")
_BEFORE_TEXT = re.compile(
    r"[\s*_]*+(?:\(([A-Z])\)|([A-Z])(?:\s?[).:]|\s++[-\u2013\u2014]))[\s*_]*+(.+)"
)
_LEADING = re.compile(r"[\s*_$]*+(?:(?:option|choice)\s+)?([A-Z])\b(?!['\u2019])")
_PARENTHESES = re.compile(r"\(([A-Z])\)")
_MORE = re.compile(
    r"[\s*)]*+(?:,|/|&|\bor\b|\band\b)\s*+(?:(?:option|choice)\s++)?[(*]*+[A-Z]\b(?!['\u2019])"
)
_WORD_NEXT = re.compile(r"\s++(?!(?:because|since|as|for)\b)\w")
_AMBIGUOUS = "?"


def grade_multiple_choice(prompt: Prompt, completion: str) -> Score:
    """Score 1.0 or 0.0; UNKNOWN when the prompt's answer names no option."""
    choices = prompt.metadata.get("choices")
    if choices is not None and not _are_texts(choices):
        return Score.unknown('metadata["choices"] is no list of at most 26 texts')
    options = _Options(choices)
    if prompt.answer is None or not prompt.answer.strip():
        return Score.unknown("the prompt has no answer")
    gold = options.whole(prompt.answer)
    if gold is None or gold == _AMBIGUOUS:
        return Score.unknown(
            f"the prompt's answer {prompt.answer[:100]!r} is neither a letter of an option nor the text of exactly one"
        )
    chosen = _chosen(options, completion)
    shown = "" if chosen is None or chosen == _AMBIGUOUS else chosen
    return Score.ok(shown == gold, answer=shown)


class _Options:
    """Letters that may be chosen, and what each stands for."""

    def __init__(self, choices: Sequence[str] | None) -> None:
        self.letters = _LETTERS if choices is None else _LETTERS[: len(choices)]
        self.texts: dict[str, str] = {}
        for letter, choice in zip(self.letters, choices or (), strict=False):
            text = _folded(choice)
            self.texts[text] = _AMBIGUOUS if text in self.texts else letter

    def whole(self, text: str) -> str | None:
        """The option that `text` as a whole names; None where it is something else."""
        by_text = self.texts.get(_folded(text))
        alone = _ALONE.fullmatch(text)
        if alone is not None:
            letter = self.known(alone[1].upper())
            return letter if by_text in (None, letter) else _AMBIGUOUS
        if by_text is not None:
            return by_text
        before = _BEFORE_TEXT.fullmatch(text)
        if before is None:
            return None
        if _PARENTHESES.search(before[3]):
            return _AMBIGUOUS
        letter = self.known(before[1] or before[2])
        stands_for = self.texts.get(_folded(before[3]))
        return letter if stands_for in (None, letter) else _AMBIGUOUS

    def known(self, letter: str) -> str:
        return letter if letter in self.letters else _AMBIGUOUS


def _chosen(options: _Options, completion: str) -> str | None:
    boxed = last_boxed(completion)
    inside = last_tagged(completion) if boxed is None else boxed
    if inside is not None:
        return options.whole(plain(inside))
    last = -1
    for match in _MARK.finditer(completion):
        last = match.end()
    if last >= 0:
        after = completion[last:].strip().partition("\n")[0]
        found = _after_mark(options, after)
        if found is not None:
            return found
    return _last_line(options, completion.strip().rpartition("\n")[2])


def _after_mark(options: _Options, text: str) -> str | None:
    if _MORE.match(text, _end_of_letter(text)):
        return _AMBIGUOUS
    whole = options.whole(text)
    if whole is not None:
        return whole
    in_parentheses = _PARENTHESES.match(text)
    if in_parentheses is not None:
        return options.known(in_parentheses[1])
    leading = _LEADING.match(text)
    if leading is None or (leading[1] in "AI" and _WORD_NEXT.match(text, leading.end())):
        return None
    return options.known(leading[1])


def _end_of_letter(text: str) -> int:
    match = _PARENTHESES.match(text) or _LEADING.match(text)
    return match.end() if match else len(text)


def _last_line(options: _Options, line: str) -> str | None:
    whole = options.whole(line)
    if whole is not None:
        return whole
    letters = set(_PARENTHESES.findall(line))
    if not letters:
        return None
    return options.known(letters.pop()) if len(letters) == 1 else _AMBIGUOUS


def _folded(text: str) -> str:
    return " ".join(text.split()).strip("*_ ").rstrip(".,;:!?").strip("*_ ").casefold()


def _are_texts(choices: object) -> bool:
    return (
        isinstance(choices, list | tuple)
        and 0 < len(choices) <= len(_LETTERS)
        and all(isinstance(choice, str) and choice.strip() for choice in choices)
    )

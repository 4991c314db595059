r"""Reward `numeric`: 1 when the completion's number equals the prompt's within a tolerance, else 0.

Where the number is read, first rule that applies: the last closed \boxed{...}; the line after the last `####`,
"answer is", "answer:" or "answer ="; the whole text. In a box or after a mark it is the first number behind the last
equals sign, in a whole text the last number. The prompt's answer is read the same way, so a worked solution that ends
in `#### 18` serves as it stands.

How it is written:

    1,234.5   1{,}234.5   1\,234.5       thousands in groups of three; any other comma separates two numbers
    -5   +5                              a sign (also U+2212) touches its number and no digit, letter or bracket before
                                         it: 7-5 ends in 5; first in a box or after a mark it may stand apart
    1/3   \frac{1}{3}   \frac13   2 1/3  fractions, mixed numbers
    1.5e-3   1.5 \times 10^{-3}   10^6   scientific notation, exponents of up to four digits
    50%   50\%                           one half; where only one side has a percent sign, 50 counts as well
    $5   5 km   5.                       currency signs, units and full stops are passed over

Digits inside a word (x2, H2O) are no number, nor are infinities, NaN, zero denominators, and numbers of more than
1000 characters. Arithmetic is not evaluated: use `math` for expressions.

Equal: |given - gold| <= max(relative_tolerance * |gold|, absolute_tolerance), computed exactly. The score's own
`answer` is the prompt's number when right, else the completion's, as a fraction in lowest terms; "" where there is
none.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from ..engine.types import Prompt, Score
from .answers import last_boxed

_MAX_CHARS = 1000
_PLAIN = r"(?:[0-9]++(?:,[0-9]++)*+(?:\.[0-9]++)?|\.[0-9]++)"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])[+-])?(?<![\w.])"
    rf"(?:(?P<mixed>[0-9]{{1,1000}}) (?=[0-9]{{1,1000}}/[0-9]))?(?P<body>{_PLAIN})"
    rf"(?![eE][+-]?[0-9]{{5}})(?:[eE](?P<exponent>[+-]?[0-9]{{1,4}})(?![0-9])|\s?/\s?(?P<under>{_PLAIN}))?\s?(?P<percent>%)?"
)
_POWER = r"10\s?(?:\^|\*\*)\s?\{?\s?([+-]?[0-9]{1,4})(?![0-9])\s?\}?"
_INNER = r"\s?([+-]?[0-9.,]{1,1000})\s?"
_REWRITES = [  # other ways to write what _NUMBER reads
    (re.compile("\u2212"), "-"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!]|[\u2009\u202f\u00a0])(?=[0-9]{3})"), ","),
    (re.compile(rf"(?<=[0-9])\s?\\[dt]?frac\{{{_INNER}\}}\{{{_INNER}\}}"), r" \1/\2"),
    (re.compile(rf"\\[dt]?frac\{{{_INNER}\}}\{{{_INNER}\}}"), r"\1/\2"),
    (re.compile(r"(?<=[0-9])\s?\\[dt]?frac\s?([0-9])([0-9])"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac\s?([0-9])([0-9])"), r"\1/\2"),
    (re.compile(rf"(?<=[0-9])\s?(?:\\times|\\cdot|\u00d7|\*|x)\s?{_POWER}"), r"e\1"),
    (re.compile(rf"(?<![\w.,]){_POWER}"), r"1e\1"),
    (re.compile(r"\\?[$\u20ac\u00a3]|\\(?=%)"), ""),
]
_GROUPED = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_MARK = re.compile(r"####|\banswer\b\**(?:\s+is\b|\s?[:=])\**:?", re.IGNORECASE)
_LOOSE_SIGN = re.compile(r"\s*([+-])\s+")


@dataclass(frozen=True, slots=True)
class Number:
    """A value as written, before a percent sign divides it by 100."""

    written: Fraction
    percent: bool = False

    @property
    def value(self) -> Fraction:
        return self.written / 100 if self.percent else self.written


def grade_numeric(
    prompt: Prompt,
    completion: str,
    *,
    relative_tolerance: float = 1e-9,
    absolute_tolerance: float = 0.0,
) -> Score:
    """Score 1.0 or 0.0; UNKNOWN when the prompt has no number. ValueError where a tolerance is no number >= 0."""
    relative = _tolerance("relative_tolerance", relative_tolerance)
    absolute = _tolerance("absolute_tolerance", absolute_tolerance)
    if prompt.answer is None:
        return Score.unknown("the prompt has no answer")
    gold = read_number(prompt.answer)
    if gold is None:
        return Score.unknown(
            f"no number in the prompt's answer {prompt.answer[:100]!r}; "
            "correct it, or grade with `exact`"
        )
    given = read_number(completion)
    if given is None:
        return Score.ok(0.0, answer="")
    pairs = [(gold.value, given.value)]
    if gold.percent != given.percent:
        pairs.append((gold.written, given.written))
    right = any(abs(b - a) <= max(relative * abs(a), absolute) for a, b in pairs)
    return Score.ok(right, answer=_text(gold.value if right else given.value))


def read_number(text: str) -> Number | None:
    """The number that `text` marks or ends in, by the rules above; None where there is none."""
    boxed = last_boxed(text)
    if boxed is not None:
        return _first(boxed)
    end = -1
    for match in _MARK.finditer(text):
        end = match.end()
    if end >= 0:
        found = _first(text[end:].strip().partition("\n")[0])
        if found is not None:
            return found
    last = None
    for number in _numbers(text):
        last = number
    return last


def _first(span: str) -> Number | None:
    span = span.rpartition("=")[2]
    loose = _LOOSE_SIGN.match(span)
    return next(_numbers(span if loose is None else loose[1] + span[loose.end() :]), None)


def _numbers(text: str) -> Iterator[Number]:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    for match in _NUMBER.finditer(text):
        first, *rest = _separate(match["body"])
        sign = -1 if match["sign"] == "-" else 1
        if rest:  # several numbers: what stands before belongs to the first, what stands behind to the last
            yield from _plain_numbers([first], sign)
            yield from _plain_numbers(rest[:-1], 1)
            sign = 1
        last = _value(match, rest[-1] if rest else first)
        if last is not None:
            yield Number(sign * last, match["percent"] is not None)


def _separate(body: str) -> list[str]:
    """`1,234.5` is one number, `1,5` are two."""
    return [body] if "," not in body or _GROUPED.fullmatch(body) else body.split(",")


def _plain_numbers(pieces: list[str], sign: int) -> Iterator[Number]:
    for piece in pieces:
        value = _fraction(piece)
        if value is not None:
            yield Number(sign * value)


def _value(match: re.Match[str], body: str) -> Fraction | None:
    """The match without its sign; None for a zero denominator and far too many digits."""
    value, mixed, under = (_fraction(text) for text in (body, match["mixed"], match["under"]))
    if value is None or under == 0:
        return None
    if match["exponent"]:
        return value * Fraction(10) ** int(match["exponent"])
    if match["under"]:
        if under is None:
            return None
        value /= under
    return value + (mixed or 0)


def _fraction(text: str | None) -> Fraction | None:
    if text is None or len(text) > _MAX_CHARS:
        return None
    return Fraction(Decimal(text.replace(",", "")))


def _tolerance(name: str, value: float) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"option {name} = {value!r}: a finite number of at least 0 is needed")
    return Fraction(value)


def _text(value: Fraction) -> str:
    """Lowest terms; beyond the digits that Python prints, a decimal."""
    top, bottom = (str(Decimal(n)) for n in (value.numerator, value.denominator))
    return top if bottom == "1" else f"{top}/{bottom}"

"""Solutions are cut after lines and sentences, between two tokens."""

import pytest
from transformers import AutoTokenizer

from plait.rollouts.pieces import Pieces


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def pieces(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    lengths = Pieces(tokenizer).lengths(ids)
    assert sum(lengths) == len(ids)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [
        str(tokenizer.decode(ids[e - n : e])).strip() for e, n in zip(ends, lengths, strict=True)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two", ["one two"]),
        ("We add. Then we stop! Done?", ["We add.", "Then we stop!", "Done?"]),
        ("line one\nline two\n\nline three", ["line one", "line two", "line three"]),
        ("pi is 3.14 here. So", ["pi is 3.14 here.", "So"]),
        ("the end.\n", ["the end."]),
    ],
)
def test_cuts(tokenizer, text, expected):
    assert pieces(tokenizer, text) == expected


def test_nothing_has_no_pieces(tokenizer):
    assert Pieces(tokenizer).lengths([]) == []

"""Reward `reasoning_gym`: the data sets' own scores, and the extraction rule."""

import json
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from plait.engine.types import Prompt, Score, ScoreStatus
from plait.rewards.answers import last_boxed
from plait.rewards.reasoning_gym import _EVALUATED, extract, grade_reasoning_gym
from plait.rollouts.config import ReasoningGymData
from plait.rollouts.readers import read_records

from .conftest import MakeScorer, make_prompt, score_texts


def make_item(dataset: str, **config: Any) -> Prompt:
    entry = reasoning_gym.create_dataset(dataset, seed=3, size=1, **config)[0]
    item = {"dataset": dataset, "entry": entry, "config": config}
    return make_prompt(answer=entry["answer"], metadata={"reasoning_gym": item})


# Data sets whose items have no answer, and where their metadata hold one that the scorer takes.
ANSWERED_IN_METADATA = {
    "boxnet": None,
    "graph_color": lambda metadata: json.dumps(metadata["possible_answer"]),
    "propositional_logic": lambda metadata: metadata["example_answer"],
    "rubiks_cube": lambda metadata: metadata["example_correct_answer"],
    "rush_hour": None,
}
SINGLE = sorted(DATASETS.keys() - {"composite"})


@pytest.mark.parametrize("dataset", SINGLE)
def test_every_data_set(dataset: str) -> None:
    """Gold scores 1 in every form, as the data set wrote the item and as a recipe's data source hands it on."""
    for item in make_items(dataset):
        prompt = make_prompt(answer=item["entry"]["answer"], metadata={"reasoning_gym": item})
        gold = prompt.answer
        assert (gold is None) == (dataset in ANSWERED_IN_METADATA)
        if gold is None:
            find = ANSWERED_IN_METADATA[dataset]
            gold = find(item["entry"]["metadata"]) if find else None
        if gold is not None:
            for form in ("{}", "I think\n<answer>{}</answer>", r"so \boxed{{{}}}."):
                text = form.format(gold)
                if "boxed" in form and last_boxed(text) != gold:
                    assert dataset == "codeio", gold  # JSON with braces that do not match
                    continue
                assert grade_reasoning_gym(prompt, text).reward == 1.0, text
        for wrong in ("no such answer", "", "[]", "{}", "-1", "\ud800", "x" * 10_000):
            score = grade_reasoning_gym(prompt, wrong)
            assert score.reward is not None, (wrong, score)
            assert score.reward < 1.0 or wrong == gold, wrong


@pytest.mark.parametrize("dataset", sorted(_EVALUATED))
def test_no_answer_is_run_as_python(dataset: str, tmp_path: Path) -> None:
    (item, *_) = make_items(dataset)
    prompt = make_prompt(answer=item["entry"]["answer"], metadata={"reasoning_gym": item})
    canary = tmp_path / "canary"
    call = f"open({str(canary)!r}, 'w')"
    full_width = call.replace("open", "\uff4f\uff50\uff45\uff4e")
    for attack in (
        call,
        f"[{call}]",
        f"24 + {call}",
        f"__import__('os').mkdir({str(canary)!r})",
        full_width,
    ):
        for form in ("{}", "<answer>{}</answer>"):
            assert grade_reasoning_gym(prompt, form.format(attack)).reward == 0.0
    assert not canary.exists()


def test_scorers_that_accept_what_is_wrong() -> None:
    (item, *_) = make_items("game_of_life_halting")
    prompt = make_prompt(metadata={"reasoning_gym": item})
    gold = item["entry"]["answer"]
    wrong = {"True": "False", "False": "True"}[gold]
    rewards = [
        grade_reasoning_gym(prompt, text).reward for text in (gold, gold.lower(), wrong, "x")
    ]
    assert rewards == [1.0, 1.0, 0.0, 0.0]
    entry = {"question": "", "answer": "(1 + 3) * (4 + 2)", "metadata": {"numbers": [3, 1, 4, 2]}}
    prompt = make_prompt(metadata={"reasoning_gym": {"dataset": "puzzle24", "entry": entry}})
    texts = ("4*3*2*1", "6*4*1*1", "4*3*2", "24")
    assert [grade_reasoning_gym(prompt, text).reward for text in texts] == [1.0, 0.0, 0.0, 0.0]


def make_items(dataset: str) -> list[dict[str, Any]]:
    entries = [reasoning_gym.create_dataset(dataset, seed=3, size=2)[i] for i in range(2)]
    items = [{"dataset": dataset, "entry": entry} for entry in entries]
    config = ReasoningGymData(type="reasoning_gym", dataset=dataset, size=1)
    (record,) = read_records(config).train
    return [*items, dict(record.metadata["reasoning_gym"])]


def test_the_configuration_of_the_data_reaches_the_scorer() -> None:
    """A word of this ladder is in no list of the default configuration."""
    words = {"min_word_length": 5, "max_word_length": 5}
    parts = [{"name": "word_ladder", "weight": 1, "config": words}]
    for dataset, config in (("word_ladder", words), ("composite", {"datasets": parts})):
        data = ReasoningGymData(type="reasoning_gym", dataset=dataset, size=1, config=config)
        (record,) = read_records(data).train
        prompt = make_prompt(answer=record.answer, metadata=record.metadata)
        assert grade_reasoning_gym(prompt, str(record.answer)).reward == 1.0


@pytest.mark.parametrize("dataset", ["chain_sum", "countdown", "knights_knaves", "gsm_symbolic"])
@pytest.mark.parametrize(
    "form", ["{}", "thinking\n\n{}\n", r"so \boxed{{{}}} .", "<answer> {} </answer> and more"]
)
def test_forms_of_the_gold_answer(dataset: str, form: str) -> None:
    prompt = make_item(dataset)
    assert grade_reasoning_gym(prompt, form.format(prompt.answer)).reward == 1.0


@pytest.mark.parametrize(
    ("completion", "gold", "answer"),
    [
        (r"<answer>1</answer> \boxed{2}", "2", "2"),
        ("<answer>1</answer> <answer>\n2 </answer>\n3", "2", "2"),
        ("a\nb\n\n", "b", "b"),
        ("a\nb\n", "a\nb", "a\nb"),
        ("", "a", ""),
        (r"\boxed{\text{yes}}", "yes", "yes"),
    ],
)
def test_extraction(completion: str, gold: str, answer: str) -> None:
    assert extract(completion, {"answer": gold}) == answer


def test_partial_credit_is_the_data_sets() -> None:
    prompt = make_item("chain_sum")
    score = grade_reasoning_gym(prompt, f"it is {prompt.answer}")
    assert score.reward is not None
    assert 0 < score.reward < 1


def test_a_scorer_that_raises_on_a_malformed_answer_means_wrong() -> None:
    prompt = make_item("prime_factorization")
    assert grade_reasoning_gym(prompt, "no number") == Score.ok(0.0, answer="no number")


def test_configuration_reaches_the_scorer() -> None:
    entry = {"question": "", "answer": "1.25", "metadata": {}}
    rewards = []
    for digits in (1, 6):
        config = {"min_num_decimal_places": 1, "max_num_decimal_places": digits}
        item = {"dataset": "decimal_arithmetic", "entry": entry, "config": config}
        prompt = make_prompt(metadata={"reasoning_gym": item})
        rewards.append(grade_reasoning_gym(prompt, "1.3").reward)
    assert rewards == [1.0, 0.0]


def test_missing_metadata_is_unknown(make_scorer: MakeScorer) -> None:
    score = grade_reasoning_gym(make_prompt(), "4")
    assert score.status is ScoreStatus.UNKNOWN
    assert 'metadata["reasoning_gym"]' in score.reason
    item = {"dataset": "no_such_set", "entry": {"answer": "4"}}
    prompt = make_prompt(metadata={"reasoning_gym": item})
    (score,) = score_texts(make_scorer("reasoning_gym"), ["4"], prompt)
    assert "Dataset 'no_such_set' not registered" in score.reason


def test_through_the_scorer(make_scorer: MakeScorer) -> None:
    prompt = make_item("knights_knaves")
    scores = score_texts(make_scorer("reasoning_gym"), [str(prompt.answer), "?"], prompt)
    assert [score.reward for score in scores] == [1.0, 0.0]


def test_the_answer_is_what_was_extracted() -> None:
    prompt = make_item("chain_sum")
    assert grade_reasoning_gym(prompt, "so\n\\boxed{ 3  4 }").answer == "3 4"
    assert grade_reasoning_gym(prompt, "").answer == ""

"""The scorer's own promises: order, grouping, streaming, budget, errors, and dying with its driver."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from plait.engine.errors import ConfigError, RewardError
from plait.engine.types import (
    Demonstration,
    Prompt,
    Rollout,
    RolloutGroup,
    RolloutRequest,
    Sampling,
    Score,
)
from plait.rewards.config import RewardConfig
from plait.rewards.scorer import ProcessScorer

from .conftest import MakeScorer, make_prompt, make_rollout, score_texts

SAMPLING = Sampling(max_tokens=8)
LENGTH = """
    def reward(prompt, completion):
        return len(completion)
"""
UNKNOWN_X = """
    def reward(prompt, completion):
        return None if completion.startswith("x") else 1.0
"""


def test_groups_come_in_request_order_with_rollouts_by_index(make_scorer: MakeScorer) -> None:
    scorer = make_scorer("user_rewards:reward", LENGTH)
    a, b = make_prompt("a"), make_prompt("b")
    requests = [
        RolloutRequest(b, 2, SAMPLING),
        RolloutRequest(a, 2, SAMPLING),
        RolloutRequest(b, 1, SAMPLING, prefix=(9,), first_index=2),
    ]
    arrivals = [("a", 1, "22"), ("b", 2, "333"), ("b", 0, "1"), ("a", 0, "4444"), ("b", 1, "")]
    groups = scorer.score(requests, [make_rollout(*arrival) for arrival in arrivals])
    assert [group.prompt.prompt_id for group in groups] == ["b", "a"]
    assert [[r.index for r in group.rollouts] for group in groups] == [[0, 1, 2], [0, 1]]
    assert [group.rewards for group in groups] == [(1.0, 0.0, 3.0), (4.0, 2.0)]
    assert scorer.score([], []) == []


def test_scoring_overlaps_generation(make_scorer: MakeScorer) -> None:
    code = """
        import time
        def reward(prompt, completion):
            time.sleep(0.3)
            return 1.0
    """
    scorer = make_scorer("user_rewards:reward", code)
    scorer.wait_ready()
    ended = 0.0

    def generate() -> Iterator[Rollout]:
        nonlocal ended
        for index in range(8):
            time.sleep(0.2)
            yield make_rollout("p", index, "text")
        ended = time.monotonic()

    (group,) = scorer.score([RolloutRequest(make_prompt(), 8, SAMPLING)], generate())
    assert group.rewards == (1.0,) * 8
    assert time.monotonic() - ended < 0.8  # 0.3 plus some; scored afterwards it would be 1.2


@pytest.mark.parametrize(
    ("arrivals", "message"),
    [
        ([("a", 0)], r"prompt 'a' lacks rollouts \[1\] of 2"),
        ([("a", 0), ("a", 0)], "rollout 0 of prompt 'a' came twice"),
        ([("a", 7)], "rollout 7 of prompt 'a' was not requested"),
        ([("z", 0)], "rollout 0 of prompt 'z' was not requested"),
    ],
)
def test_wrong_rollouts_are_named(
    make_scorer: MakeScorer, arrivals: list[tuple[str, int]], message: str
) -> None:
    scorer = make_scorer("exact")
    rollouts = [make_rollout(prompt_id, index, "4") for prompt_id, index in arrivals]
    with pytest.raises(RewardError, match=message):
        scorer.score([RolloutRequest(make_prompt("a"), 2, SAMPLING)], rollouts)


def test_overlapping_requests_are_refused(make_scorer: MakeScorer) -> None:
    request = RolloutRequest(make_prompt("a"), 2, SAMPLING)
    with pytest.raises(RewardError, match=r"'a' is requested twice .* \[0, 1\]; .*first_index"):
        make_scorer("exact").score([request, request], [])


def test_an_error_of_the_iterator_passes_and_the_scorer_goes_on(make_scorer: MakeScorer) -> None:
    scorer = make_scorer("user_rewards:reward", LENGTH)

    def broken() -> Iterator[Rollout]:
        yield make_rollout("p", 0, "text")
        raise LookupError("worker gone")

    with pytest.raises(LookupError, match="worker gone"):
        scorer.score([RolloutRequest(make_prompt(), 2, SAMPLING)], broken())
    assert score_texts(scorer, ["12"])[0].reward == 2.0


def test_unknown_budget_stops_the_run_and_keeps_the_inputs(
    make_scorer: MakeScorer, tmp_path: Path, measured: Callable[[str, str], None]
) -> None:
    unknown_path = tmp_path / "unknown.jsonl"
    scorer = make_scorer(
        "user_rewards:reward", UNKNOWN_X, unknown_path=unknown_path, max_unknown_fraction=0.2
    )
    assert score_texts(scorer, ["x"])[0].reward is None  # one alone never stops a run
    score_texts(scorer, ["x", "xx"] + ["fine"] * 8)  # exactly the allowed share
    unknown_path.unlink()
    with pytest.raises(RewardError) as caught:
        score_texts(scorer, ["x1", "x2\ud800é", "x3"] + ["fine"] * 7)
    for part in ("3 of 10", "max_unknown_fraction = 0.2", "3 x returned None", str(unknown_path)):
        assert part in str(caught.value)
    records = [json.loads(line) for line in unknown_path.read_text().splitlines()]
    assert sorted(record["index"] for record in records) == [0, 1, 2]
    assert {
        "prompt_id": "p",
        "index": 1,
        "completion": "x2\ud800é",
        "reward": "user_rewards:reward",
        "reason": "returned None",
    } in records
    measured("F24", "3 of 10 UNKNOWN over a budget of 20 %: the run stops, inputs kept 3/3")


def test_rounds_of_a_step_share_their_budget_of_unknown_scores(make_scorer: MakeScorer) -> None:
    scorer = make_scorer("user_rewards:reward", UNKNOWN_X, max_unknown_fraction=0.2)

    def round_of(*texts: str, earlier: Sequence[RolloutGroup]) -> Sequence[RolloutGroup]:
        request = RolloutRequest(make_prompt(), len(texts), SAMPLING)
        rollouts = [make_rollout("p", i, text) for i, text in enumerate(texts)]
        return scorer.score([request], rollouts, earlier)

    first = round_of(*["fine"] * 8, earlier=[])
    second = round_of("x", "x", earlier=first)
    with pytest.raises(RewardError, match="3 of 11 scores"):
        round_of("x", earlier=[*first, *second])


def test_each_prompt_may_name_its_reward(make_scorer: MakeScorer) -> None:
    scorer = make_scorer("user_rewards:reward", LENGTH)
    own = make_prompt("own", reward="exact")
    requests = [RolloutRequest(own, 1, SAMPLING), RolloutRequest(make_prompt("p"), 1, SAMPLING)]
    groups = scorer.score(requests, [make_rollout("own", 0, "4"), make_rollout("p", 0, "four")])
    assert [group.rewards for group in groups] == [(1.0,), (4.0,)]
    with pytest.raises(ConfigError, match=r"prompts\['q'\]\.reward = 'exat': .*mean 'exact'"):
        score_texts(scorer, ["4"], make_prompt("q", reward="exat"))
    assert score_texts(scorer, ["12"])[0].reward == 2.0


def test_a_module_that_cannot_be_imported_stops_at_once(make_scorer: MakeScorer) -> None:
    scorer = make_scorer("user_rewards:reward", "import numpyy")
    with pytest.raises(ConfigError, match=r"reward\.function = .*No module named 'numpyy'"):
        scorer.wait_ready()
    with pytest.raises(ConfigError, match="numpyy"):
        score_texts(scorer, ["4"])


def test_a_module_that_exits_or_crashes_at_import_stops_at_once(make_scorer: MakeScorer) -> None:
    with pytest.raises(ConfigError, match=r"importing failed: SystemExit: 2"):
        make_scorer("user_rewards:reward", "raise SystemExit(2)").wait_ready()
    code = "import ctypes; ctypes.string_at(0)"
    with pytest.raises(RewardError, match=r"reward\.function = .* killed by SIGSEGV"):
        make_scorer("user_rewards:reward", code).wait_ready()


def test_prompts_that_cannot_travel_are_named(make_scorer: MakeScorer) -> None:
    prompt = make_prompt("odd", metadata={"lock": threading.Lock()})
    with pytest.raises(RewardError, match=r"prompt 'odd' cannot be sent .*plain data"):
        score_texts(make_scorer("exact"), ["4"], prompt)


def test_large_inputs_pass(make_scorer: MakeScorer) -> None:
    scorer = make_scorer("user_rewards:reward", LENGTH)
    assert score_texts(scorer, ["x" * 5_000_000])[0].reward == 5_000_000


def test_two_calls_at_once(make_scorer: MakeScorer) -> None:
    scorer = make_scorer("user_rewards:reward", LENGTH)
    results: dict[int, tuple[float | None, ...]] = {}

    def call(size: int) -> None:
        scores = score_texts(scorer, ["x" * size] * 50, make_prompt(f"p{size}"))
        results[size] = tuple(score.reward for score in scores)

    threads = [threading.Thread(target=call, args=(size,)) for size in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {size: (float(size),) * 50 for size in (1, 2, 3)}


def test_a_sample_that_only_went_well_once_keeps_no_replacement_from_work(
    make_scorer: MakeScorer, tmp_path: Path
) -> None:
    """Replacements begin with a sample that was graded well; this one ends whoever grades it again."""
    code = f"""
        import os, pathlib, sys

        mark = pathlib.Path({str(tmp_path / "mark")!r})

        def reward(prompt, completion):
            if completion == "die":
                os._exit(3)
            if completion == "once" and mark.exists():
                sys.exit()
            mark.touch()
            return 1.0
    """
    scorer = make_scorer("user_rewards:reward", code, num_workers=1)
    found: list[float | None] = []

    def score() -> None:
        for text in ("once", "die", "fine"):
            found.append(score_texts(scorer, [text])[0].reward)

    thread = threading.Thread(target=score, daemon=True)
    thread.start()
    thread.join(20.0)
    assert found == [1.0, None, 1.0]


def test_a_process_that_died_while_idle_costs_nothing(make_scorer: MakeScorer) -> None:
    scorer = make_scorer("user_rewards:reward", LENGTH)
    scorer.wait_ready()
    workers = [p for p in psutil.Process().children() if "plait.rewards.worker" in str(p.cmdline())]
    for process in workers:
        process.kill()
    while any(process.status() != psutil.STATUS_ZOMBIE for process in workers):
        time.sleep(0.001)
    assert [score.reward for score in score_texts(scorer, ["x"] * 20)] == [1.0] * 20


def test_closing_ends_a_call_under_way(make_scorer: MakeScorer) -> None:
    scorer = make_scorer("user_rewards:reward", "import time\nreward = lambda p, c: time.sleep(60)")
    scorer.wait_ready()
    threading.Timer(0.2, scorer.close).start()
    with pytest.raises(RewardError, match="closed"):
        score_texts(scorer, ["4"])
    with pytest.raises(RewardError, match="closed"):
        score_texts(scorer, ["4"])


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(RewardError, match="'/no/such/folder' is not a folder"):
        ProcessScorer(RewardConfig(function="exact"), "/no/such/folder")


# The driver is a script without a __main__ guard, in a folder that holds only rewards.py.
DRIVER = """
from plait.engine.types import Prompt, Rollout, RolloutRequest, Sampling
from plait.rewards.config import RewardConfig
from plait.rewards.scorer import ProcessScorer

scorer = ProcessScorer(RewardConfig(function="rewards:my_reward"))
prompt = Prompt("p", (), (1,), answer="4")
rollouts = [Rollout("p", i, (1,), 0, (), 0, "stop", "4") for i in range(2)]
(group,) = scorer.score([RolloutRequest(prompt, 2, Sampling(8))], rollouts)
print(group.rewards)
"""


def test_a_users_script_and_its_rewards_module(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("from helper import VALUE\nmy_reward = lambda p, c: VALUE")
    (tmp_path / "helper.py").write_text("VALUE = 0.25")
    (tmp_path / "drive.py").write_text(DRIVER)
    command = [sys.executable, "drive.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr, done.returncode) == ("(0.25, 0.25)\n", "", 0)


def test_a_sample_whose_process_was_killed_is_graded_by_another_one(
    make_scorer: MakeScorer, tmp_path: Path
) -> None:
    """Once: who is killed again may be killed for what it does."""
    code = f"""
        import os, pathlib
        def reward(prompt, completion):
            with pathlib.Path({str(tmp_path)!r}, completion).open("a") as file:
                file.write("begun ")
            begun = pathlib.Path({str(tmp_path)!r}, completion).read_text().split()
            if completion == "always" or len(begun) == 1:
                os.kill(os.getpid(), 9)
            return 1.0
    """
    once, always = score_texts(make_scorer("user_rewards:reward", code), ["once", "always"])
    assert once == Score.ok(1.0)
    assert always.reward is None
    assert "killed by SIGKILL" in always.reason
    assert (tmp_path / "always").read_text().split() == ["begun"] * 2


def test_no_process_survives_a_killed_driver(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "import os, subprocess, sys, time\n"
        "def my_reward(prompt, completion):\n"
        "    sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "    child = subprocess.Popen(sleep, start_new_session=True)\n"
        "    with open('pids.txt', 'a') as file:\n"
        "        file.write(f'{os.getpid()}\\n{child.pid}\\n')\n"
        "    while True: pass\n"
    )
    (tmp_path / "drive.py").write_text(DRIVER)
    driver = subprocess.Popen([sys.executable, "drive.py"], cwd=tmp_path)
    pids_path = tmp_path / "pids.txt"
    wait_for(lambda: pids_path.exists() and len(pids_path.read_text().splitlines()) == 4, 20)
    processes = [psutil.Process(int(pid)) for pid in pids_path.read_text().split()]
    processes += psutil.Process(driver.pid).children()  # the guard too
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not any(map(is_alive, processes)), 2)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def demonstrate(prompt_id: str, *texts: str) -> Prompt:
    return make_prompt(prompt_id, demonstrations=tuple(Demonstration((1, 2), t) for t in texts))


def rewards_of(prompts: Sequence[Prompt]) -> list[list[float | None]]:
    return [[d.score.reward if d.score else -9.0 for d in p.demonstrations] for p in prompts]


def test_demonstrations_are_graded_once_and_unknown_ones_again(
    make_scorer: MakeScorer, tmp_path: Path
) -> None:
    code = """
        from pathlib import Path
        def reward(prompt, completion):
            with open("calls", "a") as file:
                file.write(completion + " ")
            if completion == "late" and not Path("ready").exists():
                return None
            return float(len(completion) > 2)
    """
    kept = tmp_path / "unknown.jsonl"
    scorer = make_scorer("user_rewards:reward", code, kept, num_workers=1)
    own = replace(Demonstration((1, 2), "own"), score=Score.ok(0.25))
    prompts = [
        demonstrate("a", "right", "no"),
        demonstrate("b", "late"),
        make_prompt("c", demonstrations=(own,)),
        make_prompt("d"),
    ]
    graded = scorer.grade(prompts)
    assert rewards_of(graded) == [[1.0, 0.0], [None], [0.25], []]
    assert [p.prompt_id for p in graded] == ["a", "b", "c", "d"]
    line = json.loads(kept.read_text())
    assert (line["prompt_id"], line["demonstration"], line["completion"]) == ("b", 0, "late")
    (tmp_path / "ready").touch()
    assert rewards_of(scorer.grade(prompts)) == [[1.0, 0.0], [1.0], [0.25], []]
    assert sorted((tmp_path / "calls").read_text().split()) == ["late", "late", "no", "right"]

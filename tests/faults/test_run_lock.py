"""F36: one process writes a run folder at a time, and a lock does not outlive its holder."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
from lock_rival import hold

from plait.engine.errors import RunInUse
from plait.launch.run_lock import LOCK_FILE, lock_run

TRIES = 20
# A fork of the process that runs the tests may not fit into memory.
SERVER = multiprocessing.get_context("forkserver")


def test_f36_two_jobs_on_one_folder(tmp_path, capfd, measured):
    """The holder of one try is killed before the next: its lock is stale, and taken over."""
    corruptions = 0
    for number in range(TRIES):
        start, pipes = SERVER.Event(), [SERVER.Pipe() for _ in range(2)]
        rivals = [SERVER.Process(target=hold, args=(tmp_path, start, pipe[1])) for pipe in pipes]
        for rival in rivals:
            rival.start()
        start.set()
        found = dict(pipe[0].recv() for pipe in pipes)
        winner = found.pop("held")
        ((refusal, _loser),) = found.items()
        assert "is in use by" in refusal
        corruptions += (tmp_path / "writer").read_text() != str(winner)
        with pytest.raises(RunInUse, match=f"process {winner} on "), lock_run(tmp_path):
            pass
        os.kill(winner, signal.SIGKILL)
        for rival in rivals:
            rival.join(30)
        with lock_run(tmp_path):
            assert f"from process {winner} on" in capfd.readouterr().err, number
    assert corruptions == 0
    measured("F36", f"second refused {TRIES} of {TRIES}, stale lock taken over {TRIES} of {TRIES}")


def test_a_lock_that_was_given_back_is_taken_without_a_word(tmp_path, capfd):
    for _ in range(2):
        with lock_run(tmp_path):
            pass
    assert capfd.readouterr().err == ""


def test_an_unreadable_owner_is_still_an_owner(tmp_path):
    with lock_run(tmp_path):
        (tmp_path / LOCK_FILE).write_bytes(b"\xff{")
        with pytest.raises(RunInUse, match="in use by"), lock_run(tmp_path):
            pass

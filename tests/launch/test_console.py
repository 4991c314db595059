"""Both views say the same numbers; the terminal's is drawn into a buffer."""

import io

from rich.console import Console

from plait.launch.console import PlainConsole, TerminalConsole, describe

METRICS = {
    "reward/mean": 0.5,
    "reward/unknown": 2,
    "main/mu": 0.3,
    "tokens/computed": 1000,
    "time/update": 2.0,
    "time/step": 3.0,
}


def test_a_step_fits_on_a_line():
    line = describe(METRICS)
    assert "reward 0.500" in line
    assert "unknown 2" in line
    assert "500 tok/s trained" in line
    assert "sampled" not in line, "what was not measured is not shown"


def test_plain_lines(capsys):
    console = PlainConsole()
    console.begin(0, 2)
    console.phase("rollout")
    console.progress(1, 8)
    console.step(1, METRICS)
    console.close()
    out = capsys.readouterr().out
    assert out.startswith("step 1/2  reward 0.500")
    assert "left 0:0" in out


def test_the_terminal_shows_phase_progress_and_time_left():
    screen = io.StringIO()
    console = TerminalConsole(Console(file=screen, force_terminal=True, width=120, highlight=False))
    console.begin(3, 10)
    console.phase("rollout")
    console.progress(5, 8)
    console.step(4, METRICS)
    console.close()
    drawn = screen.getvalue()
    for words in (
        "resuming after step 3 of 10",
        "rollout",
        "step 4/10",
        "reward 0.500",
        "4/10 steps",
    ):
        assert words in drawn


def test_losses_of_a_stage_are_shown_too():
    assert describe({"1.main/mu": 0.25}) == describe({"main/mu": 0.25}) == "mu 0.250"

"""What a person sees while a run goes on: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

WIDTH = 120
"""Characters of a line in a file."""


def wide_console() -> Console:
    """For tables: as wide as the terminal, or as a line in a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def make_console() -> TerminalConsole | PlainConsole:
    return TerminalConsole() if sys.stdout.isatty() else PlainConsole()


class Estimate:
    """Time left from the mean step so far."""

    def __init__(self, step: int, steps: int) -> None:
        self.first, self.steps, self.started = step, steps, time.monotonic()

    def left(self, step: int) -> str:
        done = step - self.first
        if done <= 0:
            return "?"
        seconds = (time.monotonic() - self.started) / done * (self.steps - step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def describe(metrics: Mapping[str, float]) -> str:
    """The numbers of a step that fit on a line, whichever stage trained (its losses are `0.main`, `1.main`)."""
    metrics = {name.lstrip("0123456789."): value for name, value in metrics.items()}
    parts = []
    for label, name, form in (
        ("reward", "reward/mean", ".3f"),
        ("unknown", "reward/unknown", ".0f"),
        ("mu", "main/mu", ".3f"),
        ("policy", "main/policy_loss", ".4f"),
        ("expert", "main/expert_loss", ".4f"),
        ("grad", "main/grad_norm", ".2f"),
        ("gap", "main/sampler_gap", ".4f"),
    ):
        if name in metrics and not (name == "reward/unknown" and metrics[name] == 0):
            parts.append(f"{label} {metrics[name]:{form}}")
    if "tokens/computed" in metrics and metrics.get("time/update"):
        parts.append(f"{metrics['tokens/computed'] / metrics['time/update']:.0f} tok/s trained")
    if "tokens/generated" in metrics and metrics.get("time/rollout"):
        parts.append(f"{metrics['tokens/generated'] / metrics['time/rollout']:.0f} tok/s sampled")
    return "  ".join(parts)


class PlainConsole:
    """One line a step, for logs."""

    def begin(self, step: int, steps: int) -> None:
        self.steps, self.estimate = steps, Estimate(step, steps)
        if step:
            self.say(f"resuming after step {step} of {steps}")

    def phase(self, name: str) -> None:
        """Too fine for a log."""

    def progress(self, done: int, total: int) -> None:
        """Too fine for a log."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        left = self.estimate.left(step)
        line = describe(metrics)
        self.say(f"step {step}/{self.steps}  {line}  {metrics['time/step']:.1f} s  left {left}")

    def say(self, message: str) -> None:
        print(message, flush=True)

    def close(self) -> None:
        """Nothing is held."""


class TerminalConsole:
    """A progress bar with the phase that runs now, step lines scrolling above it."""

    def __init__(self, console: Console | None = None) -> None:
        self.progress_view = Progress(
            TextColumn("[bold]{task.fields[phase]}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps  {task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=console or Console(highlight=False),
        )

    def begin(self, step: int, steps: int) -> None:
        self.estimate, self.steps = Estimate(step, steps), steps
        self.task = self.progress_view.add_task(
            "run", total=steps, completed=step, phase="start", detail="", left="?"
        )
        self.progress_view.start()
        if step:
            self.say(f"resuming after step {step} of {steps}")

    def phase(self, name: str) -> None:
        self.progress_view.update(self.task, phase=name, detail="")

    def progress(self, done: int, total: int) -> None:
        self.progress_view.update(self.task, detail=f"{done}/{total} rollouts")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        left = self.estimate.left(step)
        self.progress_view.update(self.task, completed=step, detail="", left=left)
        self.say(f"step {step}/{self.steps}  {describe(metrics)}  {metrics['time/step']:.1f} s")

    def say(self, message: str) -> None:
        self.progress_view.console.print(message)

    def close(self) -> None:
        self.progress_view.stop()

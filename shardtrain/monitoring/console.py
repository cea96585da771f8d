"""Progress of `st.fit` on the console: a live bar in a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from shardtrain.compile_cache import use_compile_cache
from shardtrain.monitoring.callbacks import Callback, RunInfo
from shardtrain.monitoring.throughput import Rate, flops_of

_FIRST_STEP = "compiling the step ..."


class ConsoleProgress(Callback):
    """Step, loss, gradient norm, tokens per second, MFU where the chip is known, time left.

    In a terminal one live line at the bottom, with evaluations and events above it. Elsewhere (a
    log file, a notebook) one line at most every `every_seconds`.

    Args:
      console: Where to; None: standard output.
      every_seconds: Between two plain lines.

    Example:
      >>> ConsoleProgress(every_seconds=30).every_seconds
      30
    """

    def __init__(self, console: Console | None = None, every_seconds: float = 10.0):
        self.console = console or _standard_output()
        self.every_seconds = every_seconds
        self._bar: Progress | None = None
        self._shown = -math.inf
        self._skipped = 0

    def on_start(self, run: RunInfo) -> None:
        """Show the bar; the first step compiles, so it says so."""
        self._run = run
        self._rate = Rate()
        self._flops = flops_of(run.plan, run.tokens_per_step)
        if run.first_step >= run.num_steps:
            return
        kept = use_compile_cache()
        if kept is not None:
            shown = kept.replace(str(Path.home()), "~", 1)
            self._print(f"compiled programs are kept in {shown}", "dim")
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.completed}[/]/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                console=self.console,
                transient=True,
                expand=True,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(
                _FIRST_STEP, total=run.num_steps, completed=run.first_step
            )
            self._bar.start()

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Update the bar, or print a line when one is due."""
        self._rate.tick()
        if metrics.get("skipped"):
            self._skipped += 1
            self._print(
                f"step {step}: loss or gradient is not finite; this step changed nothing "
                f"({self._skipped} so far)",
                "yellow",
            )
        if self._bar is not None:
            text = self._text(step, metrics, short=self.console.width < 100)
            self._bar.update(self._task, completed=step, description=text)
            return
        now = time.monotonic()
        is_last = step >= self._run.num_steps
        if is_last or now - self._shown >= self.every_seconds:
            self._shown = now
            self._print(f"step {step}/{self._run.num_steps}  {self._text(step, metrics)}")

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the held-out metrics."""
        self._rate.pause()
        values = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if k != "weight")
        self._print(f"step {step}: held-out {values}", "green")

    def on_checkpoint(self, step: int) -> None:
        """Say that a step is being written."""
        if self._bar is None and self._run.directory is not None:
            self._print(f"step {step}: checkpoint is being written in the background")

    def on_rollback(self, step: int) -> None:
        """Count again from there."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def on_end(self, result: Any) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _text(self, step: int, metrics: Mapping[str, float], short: bool = False) -> str:
        """`loss 2.31  grad 0.52  4.1k tok/s  MFU 41%  1:12 left`."""
        seconds = self._rate.seconds
        parts = [f"loss {metrics['loss']:.4f}", f"grad {metrics['grad_norm']:.2f}"]
        if seconds:
            parts.append(self._speed(seconds, short))
            if self._flops is not None:
                operations, peak = self._flops
                parts.append(f"MFU {operations / seconds / peak:.0%}")
            parts.append(f"{duration((self._run.num_steps - step) * seconds)} left")
        return "  ".join(parts)

    def _speed(self, seconds: float, short: bool) -> str:
        if self._run.tokens_per_step is not None:
            return f"{count_text(self._run.tokens_per_step / seconds)} tok/s"
        rows = count_text(self._run.examples_per_step / seconds)
        return f"{rows}/s" if short else f"{rows} examples/s"

    def _print(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False)


def _standard_output() -> Console:
    """Standard output; in a notebook plain text, as rich's live display needs ipywidgets there."""
    console = Console(highlight=False, soft_wrap=True)
    if console.is_jupyter:
        return Console(highlight=False, soft_wrap=True, force_jupyter=False, force_terminal=False)
    return console


def count_text(count: float) -> str:
    """A count in three digits or so.

    Example:
      >>> count_text(950), count_text(4120), count_text(2_885_888)
      ('950', '4.1k', '2.9M')
    """
    for unit in ("", "k", "M", "G"):
        if abs(count) < 999.5 or unit == "G":
            small = unit and abs(count) < 99.5
            return f"{count:.1f}{unit}" if small else f"{count:.0f}{unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds as a clock.

    Example:
      >>> duration(72), duration(3725)
      ('1:12', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""How a run shows itself: live bars on a terminal, plain lines elsewhere, nothing when quiet.

Progress goes to standard error, so that tables and ``--json`` on standard output stay clean.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, Self

from repro.output import own_stderr

if TYPE_CHECKING:
    from repro.plan import PlannedCell


class Listener(Protocol):
    """What an executor tells while it runs."""

    def started(self, planned: PlannedCell, worker: str) -> None:
        """A cell begins to run; ``worker`` is ``<host>:<process>``."""

    def progress_of(self, planned: PlannedCell) -> Callable[[int, int], None]:
        """Return ``progress(done, total)`` of a cell."""

    def finished(self, planned: PlannedCell, record: dict[str, Any], *, cached: bool) -> None:
        """A cell has its record; ``cached`` if it was there before this run."""

    def message(self, text: str) -> None:
        """One line for the user."""


class Pace:
    """The time left of a run: the estimates of what is not done, at the speed seen so far."""

    def __init__(self, estimate_seconds: float) -> None:
        self._estimate = estimate_seconds
        self._done = 0.0
        self._began = time.monotonic()

    def finished(self, planned: PlannedCell, *, cached: bool) -> None:
        """Take in a cell that has its record."""
        if cached:
            self._estimate -= planned.estimate_seconds
        else:
            self._done += planned.estimate_seconds

    def left(self) -> float | None:
        """Return seconds, None as long as nothing was measured."""
        if self._done <= 0:
            return None
        return max(self._estimate - self._done, 0.0) * (time.monotonic() - self._began) / self._done


class Together:
    """Several listeners as one."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners

    def started(self, planned: PlannedCell, worker: str) -> None:
        for listener in self.listeners:
            listener.started(planned, worker)

    def progress_of(self, planned: PlannedCell) -> Callable[[int, int], None]:
        shown = [listener.progress_of(planned) for listener in self.listeners]

        def show(done: int, total: int) -> None:
            for tell in shown:
                tell(done, total)

        return show

    def finished(self, planned: PlannedCell, record: dict[str, Any], *, cached: bool) -> None:
        for listener in self.listeners:
            listener.finished(planned, record, cached=cached)

    def message(self, text: str) -> None:
        for listener in self.listeners:
            listener.message(text)


class Quiet:
    """Shows nothing but messages; the base of the others."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.stream = own_stderr()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.stream is not sys.stderr:
            self.stream.close()

    def started(self, planned: PlannedCell, worker: str) -> None:
        pass

    def progress_of(self, planned: PlannedCell) -> Callable[[int, int], None]:
        return lambda done, total: None

    def finished(self, planned: PlannedCell, record: dict[str, Any], *, cached: bool) -> None:
        self.counts["cached" if cached else record["status"]] += 1

    def message(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class Plain(Quiet):
    """One line per cell that ran, for logs; cached cells are counted in one line."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.total = total
        self._announced = False

    def started(self, planned: PlannedCell, worker: str) -> None:
        self._announce_cached()

    def finished(self, planned: PlannedCell, record: dict[str, Any], *, cached: bool) -> None:
        super().finished(planned, record, cached=cached)
        if not cached:
            self._announce_cached()
            self.message(f"[{sum(self.counts.values())}/{self.total}] {line_of(planned, record)}")

    def __exit__(self, *exc: object) -> None:
        self._announce_cached()
        super().__exit__(*exc)

    def _announce_cached(self) -> None:
        if self.counts["cached"] and not self._announced:
            self._announced = True
            self.message(f"reused {self.counts['cached']} of {self.total} cells")


class Live(Quiet):
    """Rich bars: one for all cells with the time left, one for the running cells."""

    def __init__(self, total: int, estimate_seconds: float) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self.total = total
        self._pace = Pace(estimate_seconds)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[left]}"),
            console=Console(file=self.stream),
            transient=True,
        )
        self._all = self._bars.add_task("cells", total=max(total, 1), left="")
        self._running: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()
        super().__exit__(*exc)

    def started(self, planned: PlannedCell, worker: str) -> None:
        self._end(planned)  # tried again
        self._running[planned.key] = self._bars.add_task(
            _clip(planned.label), total=1, left=f"about {duration(planned.estimate_seconds)}"
        )

    def progress_of(self, planned: PlannedCell) -> Callable[[int, int], None]:
        began = time.monotonic()

        def show(done: int, total: int) -> None:
            task = self._running.get(planned.key)
            if task is not None:
                spent = time.monotonic() - began
                left = f"{duration(spent * (total - done) / done)} left" if done else ""
                self._bars.update(task, completed=done, total=max(total, 1), left=left)

        return show

    def finished(self, planned: PlannedCell, record: dict[str, Any], *, cached: bool) -> None:
        super().finished(planned, record, cached=cached)
        self._end(planned)
        self._pace.finished(planned, cached=cached)
        if not cached:
            self.message(line_of(planned, record))
        left = self._pace.left()
        text = f"{duration(left)} left" if left else ""
        self._bars.update(self._all, completed=sum(self.counts.values()), left=text)

    def _end(self, planned: PlannedCell) -> None:
        task = self._running.pop(planned.key, None)
        if task is not None:
            self._bars.remove_task(task)

    def message(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)


def listener_for(total: int, estimate_seconds: float, *, quiet: bool) -> Quiet:
    """Return live bars on a terminal, plain lines elsewhere, messages alone if quiet."""
    if quiet:
        return Quiet()
    return Live(total, estimate_seconds) if sys.stderr.isatty() else Plain(total)


def line_of(planned: PlannedCell, record: dict[str, Any]) -> str:
    """Return ``<label>: <outcome>`` of a finished cell."""
    status = record["status"]
    if status != "ok":
        text = f"{status}: {record['message']}" if record.get("message") else status
    else:
        text = ", ".join(_metric(name, value) for name, value in _shown_metrics(record))
        text = text or record.get("message") or "ok"
    return f"{planned.label}: {text} ({duration(record.get('seconds') or 0.0)})"


def _shown_metrics(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    metrics = record.get("metrics") or {}
    return [
        (name, metric)
        for name, metric in list(metrics.items())[:3]
        if isinstance(metric, dict) and metric.get("value") is not None
    ]


def _metric(name: str, metric: dict[str, Any]) -> str:
    unit = metric.get("unit") or ""
    return f"{name} {metric['value']:.4g}{unit if len(unit) <= 1 else ' ' + unit}"


def _clip(text: str, width: int = 72) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def duration(seconds: float) -> str:
    """Return a duration in words: ``8.2 s``, ``3 min 05 s``, ``1 h 20 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

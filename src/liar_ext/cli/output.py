"""What the user sees: progress on standard error, tables on standard output.

On a terminal there are bars, boxes and colours (not with NO_COLOR). Where there is none, or one
that cannot move its cursor (TERM=dumb), there are plain lines without frames or control characters,
so that logs can be read and searched.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from enum import IntEnum

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from liar_ext.report.schema import Report, SiteReport
from liar_ext.report.text import duration, latency, number, time_left
from liar_ext.report.text import layers as shown

# between two lines about the time left, where no bar can be
LINE_SECONDS = 15.0
# no frame: rules of hyphens under the head and between sections
PLAIN = box.Box("    \n    \n -- \n    \n -- \n -- \n    \n    \n", ascii=True)
# as wide as a table wants to be: nothing is cut or wrapped in a file
NO_WIDTH = 1000


class Verbosity(IntEnum):
    """How much is said while a command runs. Results and errors always are."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Verbosity:
        """What `--quiet` and `--verbose` say; normal where a command is run without them."""
        if getattr(arguments, "quiet", False):
            return cls.QUIET
        return cls.VERBOSE if getattr(arguments, "verbose", False) else cls.NORMAL


class Rate(ProgressColumn):
    """How fast it goes: `3.2/s`, or `4.1 s each`."""

    def render(self, task: Task) -> Text:
        speed = task.speed or task.finished_speed
        return Text(_rate(speed) if speed else "")


class Watcher:
    """Shows a run: a bar with rate and time left on a terminal, lines anywhere else."""

    def __init__(self, verbosity: Verbosity = Verbosity.NORMAL) -> None:
        self._verbosity = verbosity
        self._console = console(stderr=True)
        lively = not _plain(self._console) and verbosity > Verbosity.QUIET
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not lively,
        )
        self._lively = lively
        self._task: TaskID | None = None
        self._label, self._total, self._done, self._before = "", 0, 0, 0
        self._started = self._told = self._last = 0.0

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Watcher:
        """One that says as much as a command's options ask for."""
        return cls(Verbosity.of(arguments))

    def __enter__(self) -> Watcher:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, layers: int, label: str, done: int = 0) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(label, total=layers, completed=done)
        self._label, self._total, self._done, self._before = label, layers, done, done
        self._started = self._told = self._last = time.monotonic()
        if done:
            self.tell(f"{label}: goes on, {done} of {layers} are done")

    def site(self, report: SiteReport) -> None:
        across = f", for layers {shown(report.across)} of the source too" if report.across else ""
        self.tell(
            f"layer {report.layer:3d} {report.kind:5s} {report.units_before:5d} -> "
            f"{report.units_after:5d} units, relative residual {report.relative_residual:.4f}"
            f"{across}"
        )
        self.detail("; ".join(_details(report)))

    def layer(self, index: int) -> None:
        self._done += 1
        if self._task is not None:
            self._progress.advance(self._task)
        now = time.monotonic()
        self.detail(f"{self._label} {index}: {now - self._last:.2f} s")
        self._last = now
        steps, left = self._done - self._before, self._total - self._done
        if not self._lively and left > 0 and now - self._told >= LINE_SECONDS:
            self._told = now
            speed = steps / (now - self._started)
            self.tell(
                f"{self._label}: {self._done} of {self._total}, {_rate(speed)}"
                f"{time_left(steps, steps + left, now - self._started)}"
            )

    def tell(self, message: str) -> None:
        if self._verbosity > Verbosity.QUIET:
            self._console.print(message, markup=False, soft_wrap=True)

    def detail(self, message: str) -> None:
        """What `--verbose` asks for."""
        if self._verbosity == Verbosity.VERBOSE:
            self._console.print(f"  {message}", style="dim", markup=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        if self._verbosity > Verbosity.QUIET:
            self._console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)


def console(*, stderr: bool = False) -> Console:
    """Standard output, or error, as wide as the terminal; of no end where there is none."""
    found = Console(stderr=stderr, highlight=False)
    # a width that was asked for holds, also for a file
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = NO_WIDTH
    return found


def warn(arguments: argparse.Namespace, message: str) -> None:
    """One line on standard error; it is in the report as well."""
    if Verbosity.of(arguments) > Verbosity.QUIET:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def print_table(table: RenderableType) -> None:
    """A table, or a group with tables, on standard output."""
    out = console()
    for part in table.renderables if isinstance(table, Group) else [table]:
        if isinstance(part, Table):
            part.box, part.title_style = box.SIMPLE_HEAD, "bold"
        if _plain(out) and isinstance(part, Table):
            _print_plain(part, out)
        else:
            out.print(part)


def _print_plain(table: Table, out: Console) -> None:
    """Without a frame, without blanks at the ends of lines, the title on a line of its own."""
    if table.title:
        out.print(table.title, soft_wrap=True)
    table.title, table.box = None, PLAIN
    with out.capture() as captured:
        out.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    print("\n".join(line for line in lines if line), flush=True)


def _plain(found: Console) -> bool:
    return not found.is_terminal or found.is_dumb_terminal


def _rate(speed: float) -> str:
    return f"{speed:.1f}/s" if speed >= 1 else f"{duration(1 / speed)} each"


def _details(report: SiteReport) -> list[str]:
    """Of one Site, what its line does not say."""
    found = [f"{report.columns_before} -> {report.columns_after} columns"]
    if report.ridge_used is not None:
        asked = "" if report.ridge in (None, report.ridge_used) else f" (asked {report.ridge:g})"
        found.append(f"ridge {report.ridge_used:g}{asked}")
    if report.condition is not None:
        found.append(f"condition {number(report.condition)}")
    if report.dead_columns:
        found.append(f"{report.dead_columns} columns without variance")
    found += [str(part) for part in (report.precision,) if part]
    found += ["adds a bias"] if report.bias_added else []
    found += [f"{phase} {seconds:.2f} s" for phase, seconds in report.seconds.items() if seconds]
    return [*found, *report.steps, *report.remarks]


def summary(report: Report) -> Table:
    """The closing table of a compression."""
    totals = report.totals
    loads = report.layout.replace("stock", "transformers").replace("liar_ext", "liar_ext.load")
    table = Table(title=f"{escape(report.source)}: loads with {loads}", title_justify="left")
    for name in ("", "before", "after", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row(*_ratio("parameters", totals["parameters_before"], totals["parameters_after"]))
    if report.layers:
        table.add_row(*_ratio("layers", report.layers["before"], report.layers["after"]))
    if totals["site_parameters_before"]:
        table.add_row(
            *_ratio("targeted", totals["site_parameters_before"], totals["site_parameters_after"])
        )
        table.add_row(
            *_ratio("targeted FLOPs", totals["site_flops_before"], totals["site_flops_after"])
        )
    if "site_latency_after" in totals:
        before, after = totals["site_latency_before"], totals["site_latency_after"]
        table.add_row("predicted latency", latency(before), latency(after), f"{after / before:.3f}")
    if "bytes_after" in totals:
        table.add_row(*_ratio("bytes", totals["bytes_before"], totals["bytes_after"]))
    residuals = [site.relative_residual for site in report.sites]
    if residuals:
        table.add_section()
        mean = sum(residuals) / len(residuals)
        table.add_row("relative residual", "", f"{mean:.4f}", "mean")
        table.add_row("", "", f"{max(residuals):.4f}", "worst")
    table.add_section()
    for phase, seconds in report.seconds.items():
        share = seconds / max(report.seconds["total"], 1e-9)
        if seconds < 0.005:
            continue  # no criterion asked for gradients, and what is nothing in a table
        table.add_row(phase, "", f"{seconds:.2f} s", f"{share:.0%}")
    return table


def _ratio(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, f"{before:,}", f"{after:,}", f"{after / before:.3f}"

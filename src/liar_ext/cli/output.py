"""What the user sees: progress on standard error, tables on standard output."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from liar_ext.report.schema import Report, SiteReport
from liar_ext.report.text import latency
from liar_ext.report.text import layers as shown


class Watcher:
    """Shows a compression: a bar with the time left on a terminal, a line per Site anywhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Watcher:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, layers: int, label: str, done: int = 0) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(label, total=layers, completed=done)
        if done:
            self._console.print(f"{label}: goes on, {done} of {layers} are done")

    def site(self, report: SiteReport) -> None:
        across = f", for layers {shown(report.across)} of the source too" if report.across else ""
        self._console.print(
            f"layer {report.layer:3d} {report.kind:5s} {report.units_before} -> "
            f"{report.units_after} units, relative residual {report.relative_residual:.4f}{across}"
        )

    def layer(self, index: int) -> None:
        if self._task is not None:
            self._progress.advance(self._task)

    def tell(self, message: str) -> None:
        self._console.print(message, markup=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        self._console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)


def console() -> Console:
    """Standard output; what is no terminal has room for any table."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=240)


def print_table(table: Table) -> None:
    Console(highlight=False).print(table)


def summary(report: Report) -> Table:
    """The closing table of a compression."""
    totals = report.totals
    table = Table(title=f"{report.source}: loads with {report.layout}", title_justify="left")
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
        if not seconds:
            continue  # no criterion asked for gradients
        table.add_row(phase, "", f"{seconds:.2f} s", f"{share:.0%}")
    return table


def _ratio(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, f"{before:,}", f"{after:,}", f"{after / before:.3f}"

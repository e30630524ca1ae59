"""The figures this project set itself, and whether a result reaches them.

One table for the command line, which judges its own rows, and for `docs/performance.md`, which
judges the committed ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["reached", "missed", "unmeasured"]


@dataclass(frozen=True)
class Goal:
    """One figure to reach.

    Attributes:
        line: what it is about. benchmark: `liar bench` name that measures it.
        device: kind of device it is set for; None for either.
        where: fields that a row must have. metric: the field that is compared.
        limit: compared with the worst such row; at_least: it must not be below, else not above.
    """

    line: str
    benchmark: str
    device: Literal["cpu", "cuda"] | None
    where: Mapping[str, Any] = field(hash=False)
    metric: str
    limit: float
    at_least: bool

    @property
    def text(self) -> str:
        name, form = METRICS[self.metric]
        return f"{name} {'≥' if self.at_least else '≤'} {form.format(self.limit)}"

    def shown(self, value: float) -> str:
        return METRICS[self.metric][1].format(value)

    def holds(self, row: Mapping[str, Any]) -> bool:
        # a raised ridge is another system: its error is no error of the solver, and it is reported
        if self.metric == "forward_error" and row.get("steps"):
            return True
        value = self.value(row)
        return value >= self.limit if self.at_least else value <= self.limit

    def value(self, row: Mapping[str, Any]) -> float:
        """What is compared; a bias may have either sign."""
        value = float(row[self.metric])
        return abs(value) if self.metric == "bias" else value

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Those it speaks of: right, what a user gets without forcing anything, with the metric."""
        return [
            row
            for row in rows
            if row.get("ok")
            and row.get("chosen")
            and row.get(self.metric) is not None
            and all(row.get(name) == value for name, value in self.where.items())
        ]


METRICS = {
    "ratio": ("times as fast as the baseline", "{:.2f}"),
    "share": ("useful rate over the measured matmul rate", "{:.2f}"),
    "bandwidth": ("bytes a second over those of a large copy", "{:.2f}"),
    "error": ("relative error", "{:.1e}"),
    "bias": ("one-sided error of the diagonal", "{:.1e}"),
    "extraction": ("time over (its tiles / triangle's tiles) × the triangle's time", "{:.2f}"),
    "overhead": ("time on top", "{:.1%}"),
    "slowdown": ("time over the library's", "{:.2f}"),
    "forward_error": ("relative error of Q, or a reported ladder step", "{:.1e}"),
}


@dataclass(frozen=True)
class Verdict:
    """What became of a goal.

    Attributes:
        value: of the row that is furthest from the goal, None if unmeasured.
        best: a variant that does better than the chosen one there, with its value.
    """

    goal: Goal
    state: State
    value: float | None = None
    row: Mapping[str, Any] | None = None
    best: str | None = None


def _gram(line: str, metric: str, limit: float, at_least: bool, **where: Any) -> Goal:
    device = where.pop("device", "cuda")
    return Goal(line, "gram", device, where, metric, limit, at_least)


def _solve(line: str, metric: str, limit: float, at_least: bool, **where: Any) -> Goal:
    return Goal(line, "solve", "cuda", where, metric, limit, at_least)


def _cosine(device: Literal["cpu", "cuda"], metric: str, limit: float, dtype: str) -> Goal:
    where = {"n": 4096, "dtype": dtype, "case": "all"}
    return Goal(f"cosines, {dtype}, d = 4096", "cosine", device, where, metric, limit, True)


# one-sided error of a diagonal that is no worse than rounding
TRUNCATION = 1e-6
_TRIANGLE = {"case": "triangle"}
_WIDE = (4096, 11008, 14336, 28672)

GOALS = (
    *(
        _gram(f"Gram, bfloat16, n = {n}", metric, limit, True, n=n, dtype="bfloat16", **_TRIANGLE)
        for n in _WIDE
        for metric, limit in (("ratio", 1.8), ("share", 0.85))
    ),
    *(
        _gram(f"Gram with extraction, kept first, {f:.0%}", "extraction", 1.05, False, **where)
        for f in (0.5, 0.8)
        for where in [{"case": f"keep {f:g} prefix", "dtype": "bfloat16"}]
    ),
    _gram("Gram, float32, n = 11008", "ratio", 4.0, True, n=11008, dtype="float32", **_TRIANGLE),
    _gram("Gram, float32, n = 11008", "error", 1e-6, False, n=11008, dtype="float32", **_TRIANGLE),
    _gram("Gram, bfloat16, truncation", "bias", TRUNCATION, False, dtype="bfloat16", **_TRIANGLE),
    _gram("Gram, token mask", "overhead", 0.02, False, case="mask", dtype="bfloat16"),
    _gram("Gram, column sums", "overhead", 0.02, False, case="product", dtype="bfloat16"),
    _solve("solve, 64 × 128²", "ratio", 4.0, True, batch=64, s=128),
    _solve("solve, 256 × 64²", "ratio", 4.0, True, batch=256, s=64),
    *(
        _solve(f"solve, {b} × {s}²", "slowdown", 1.1, False, batch=b, s=s)
        for b, s in ((12, 1536), (1, 5504), (1, 11008))
    ),
    Goal(
        "solve, condition 1e2 … 1e10", "solve", None, {"kind": "condition"}, "forward_error", 1e-6,
        False,
    ),
    *(
        _gram(f"Gram, {d}, n = {n}", "ratio", 1.8, True, n=n, dtype=d, device="cpu", **_TRIANGLE)
        for n in (4096, 11008)
        for d in ("float32", "bfloat16")
    ),
    # cosine_similarity reads and writes five times the bytes that are needed
    _cosine("cuda", "bandwidth", 0.8, "bfloat16"),
    _cosine("cuda", "bandwidth", 0.8, "float32"),
    _cosine("cuda", "ratio", 4.0, "bfloat16"),
    *(_cosine("cpu", "ratio", 2.0, dtype) for dtype in ("float32", "bfloat16")),
)  # fmt: skip


def judge(goal: Goal, result: Mapping[str, Any] | None) -> Verdict:
    """The verdict on `goal` from one result of its benchmark, or `unmeasured` without one."""
    if result is None or (goal.device is not None and result["device"] != goal.device):
        return Verdict(goal, "unmeasured")
    rows = goal.rows(result["rows"])
    if not rows:
        return Verdict(goal, "unmeasured")
    sign = -1.0 if goal.at_least else 1.0
    failing = [row for row in rows if not goal.holds(row)]
    # of rows that all hold, those that hold by their value say more than those by a ladder step
    plain = [row for row in rows if not row.get("steps")]
    worst = max(failing or plain or rows, key=lambda row: sign * goal.value(row))
    state: State = "missed" if failing else "reached"
    return Verdict(goal, state, goal.value(worst), worst, _better(goal, worst, result["rows"]))


def _better(goal: Goal, row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str | None:
    if goal.metric not in ("ratio", "share", "slowdown", "bandwidth"):
        return None
    names = [name for name in row if name in ("n", "tokens", "dtype", "case", "batch", "s", "r")]
    others = [
        other
        for other in rows
        if other.get("ok")
        and other.get("ours")
        and other.get(goal.metric) is not None
        # what is faster because it is less exact is no better
        and abs(other.get("bias") or 0.0) <= TRUNCATION
        and all(other.get(name) == row[name] for name in names)
    ]
    sign = 1.0 if goal.at_least else -1.0
    best = max(others, key=lambda other: sign * other[goal.metric], default=row)
    if sign * best[goal.metric] <= sign * row[goal.metric]:
        return None
    return f"{best['variant']} {goal.shown(best[goal.metric])}"


def table(result: Mapping[str, Any]) -> str:
    """The goals of the result's benchmark, one line each."""
    lines = []
    for goal in GOALS:
        if goal.benchmark != result["benchmark"]:
            continue
        verdict = judge(goal, result)
        # a CPU run has nothing to say about GPU figures but that they are unmeasured
        where = {"cuda": "GPU", "cpu": "CPU", None: "any"}[goal.device]
        found = "" if verdict.value is None else goal.shown(verdict.value)
        best = f" (best: {verdict.best})" if verdict.best else ""
        lines.append(f"  {verdict.state:10} {where} {goal.line}: {goal.text}: {found}{best}")
    return "\n".join(["goals", *(line.rstrip(": ") for line in lines)])

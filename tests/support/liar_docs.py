"""Documents as tests read them: what is in their fences, run, and held against what they print."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from liar_ext.cli import main

ROOT = Path(__file__).parents[2]
LEFT_OUT = "…"
NUMBER = re.compile(r"(?<![\w.-])[−+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
# what a machine decides, or the hour: times, memory, rates, free space
TIMES = re.compile(r"\d m?s\b|\d µs\b| min\b|[KMGT]iB\b|/s\b")


def fences(text: str) -> Iterator[tuple[str, str]]:
    """Language and body of each fenced block."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        yield found[1], found[2]


def commands(body: str) -> list[tuple[str, list[str]]]:
    """The commands of a console block with the lines printed under each."""
    found: list[tuple[str, list[str]]] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def run(command: str, folder: Path) -> list[str]:
    """What a command prints, run in a folder; `liar` in this process, which has torch already."""
    if command.startswith("liar "):
        out = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(out):
            assert main(shlex.split(command)[1:]) == 0, command
        return out.getvalue().splitlines()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def executed(body: str, folder: Path, names: dict[str, object]) -> list[str]:
    """What a block of Python prints; its names are there for the next one."""
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        exec(compile(body, "document", "exec"), names)
    return out.getvalue().splitlines()


def differences(printed: list[str], wanted: list[str], close: float = 0.05) -> list[str]:
    """Where the output is not the document's; empty where it is.

    Words must be the same. Numbers are `close`, relative to the larger one; on lines about times or
    memory they may be any. `…` stands for any lines.
    """
    problems, at = [], 0
    pieces = _pieces(wanted)
    for place, (piece, anywhere) in enumerate(pieces):
        last = place == len(pieces) - 1 and not (wanted and wanted[-1] == LEFT_OUT)
        places = list(range(at, len(printed) - len(piece) + 1)) if anywhere else [at]
        if last and anywhere:
            places = [len(printed) - len(piece)]
        fits = [s for s in places if not _unlike(printed[s : s + len(piece)], piece, close)]
        if not fits:
            where = places[0] if places else at
            problems += _unlike(printed[where : where + len(piece)], piece, close)
            return problems or [f"not printed: {piece}"]
        at = fits[0] + len(piece)
    if at < len(printed) and (not wanted or wanted[-1] != LEFT_OUT):
        problems.append(f"printed as well: {printed[at]}")
    return problems


def _pieces(wanted: list[str]) -> list[tuple[list[str], bool]]:
    """Runs of lines, and whether lines may be left out in front."""
    found: list[tuple[list[str], bool]] = [([], False)]
    for line in wanted:
        if line == LEFT_OUT:
            found.append(([], True))
        else:
            found[-1][0].append(line)
    return [piece for piece in found if piece[0]]


def _unlike(printed: list[str], wanted: list[str], close: float) -> list[str]:
    if len(printed) != len(wanted):
        return [f"{len(printed)} lines, not {len(wanted)}: {wanted}"]
    found = []
    for a, b in zip(printed, wanted, strict=True):
        words = [" ".join(NUMBER.sub("#", line).split()) for line in (a, b)]
        numbers = [[_value(n) for n in NUMBER.findall(line)] for line in (a, b)]
        timed = TIMES.search(b) is not None
        if timed:
            # units change with the value
            words = [re.sub(r"# ?(m?s|µs|min|h|[KMGT]iB|B)\b", "#", line) for line in words]
        near = len(numbers[0]) == len(numbers[1]) and all(
            abs(x - y) <= close * max(abs(x), abs(y)) for x, y in zip(*numbers, strict=True)
        )
        if words[0] != words[1] or not (near or timed):
            found.append(f"{a!r} is not {b!r}")
    return found


def _value(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))

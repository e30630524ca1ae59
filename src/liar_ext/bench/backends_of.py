"""What benchmarks of an op have in common: what is asked for, and which backends run here."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from liar_ext.bench.measure import variable
from liar_ext.errors import InputError
from liar_ext.ops import backends

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# a backend that is absent for this reason is broken, not missing
SELF_TEST = "self-test"


@dataclass(frozen=True)
class Scale:
    """What is measured where nothing is asked for."""

    tokens: int
    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    repeats: int


@dataclass(frozen=True)
class Asked:
    """What is measured.

    Attributes:
        tokens: rows; repeats: timed rounds.
        shapes: names in `DTYPES`, each with its sizes.
    """

    tokens: int
    repeats: int
    shapes: list[tuple[str, tuple[int, ...]]]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Each dtype with each of its sizes."""
        return ((name, size) for name, own in self.shapes for size in own)


def add_arguments(
    parser: argparse.ArgumentParser, defaults: Mapping[str, Scale], *, sizes: str, letter: str
) -> None:
    """The options that benchmarks of an op on (tokens, columns) share.

    Args:
        sizes: what `--sizes` counts; letter: its placeholder.
    """
    cpu, cuda = defaults["cpu"], defaults["cuda"]
    parser.add_argument("--sizes", type=int, nargs="+", metavar=letter, help=sizes)
    tokens = f"default {cpu.tokens}, on a GPU {cuda.tokens}"
    parser.add_argument("--tokens", type=int, metavar="T", help=tokens)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        metavar="D[:N,N]",
        help=f"of {', '.join(DTYPES)}; with sizes of its own after a colon",
    )
    parser.add_argument(
        "--backends", nargs="+", choices=backends.NAMES, help="default: all that run here"
    )
    repeats = f"default {cpu.repeats}, on a GPU {cuda.repeats}"
    parser.add_argument("--repeats", type=int, help=repeats)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--note", default="", help="a remark kept in the result")


def asked(args: argparse.Namespace, scale: Scale) -> Asked:
    """The options, or else what `scale` says.

    Raises:
        InputError: what is no dtype, no sizes behind it, or a number below 1.
    """
    tokens = scale.tokens if args.tokens is None else args.tokens
    repeats = scale.repeats if args.repeats is None else args.repeats
    shapes = list(_shapes(args.dtypes or scale.dtypes, tuple(args.sizes or scale.sizes)))
    found = Asked(tokens, repeats, shapes)
    sizes = [size for _, size in found]
    if min([tokens, repeats, *sizes]) < 1:
        raise InputError(
            f"sizes, tokens and repeats must be positive: {sizes}, {tokens}, {repeats}"
        )
    return found


def _shapes(dtypes: Iterable[str], sizes: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each dtype with its sizes, those of `--sizes` unless it names its own."""
    for spec in dtypes:
        name, _, own = spec.partition(":")
        if name not in DTYPES or not all(part.isdigit() for part in own.split(",") if own):
            raise InputError(
                f"--dtypes {spec}: give one of {', '.join(DTYPES)}, "
                "with sizes after a colon if it has its own, as in float32:4096,11008"
            )
        yield name, tuple(int(n) for n in own.split(",")) if own else sizes


def running(
    op: str, names: Sequence[str] | None, device: torch.device, dtype: torch.dtype
) -> tuple[list[str], dict[str, str]]:
    """Backends of an op that run on `device` with `dtype`, and why the others do not.

    Args:
        names: backends, or None for all that run and can be fast.
    Raises:
        InputError: a backend of `names` cannot run here.
    """
    reasons = {b: backends.obstacle(op, b, device, dtype) for b in names or backends.NAMES}
    if names is None:
        # neither the float64 definition nor an interpreted kernel says anything about speed
        reasons.pop("reference", None)
        if device.type == "cpu" and reasons["triton"] is None:
            reasons["triton"] = "it would be interpreted"
    absent = {name: reason for name, reason in reasons.items() if reason is not None}
    if names is not None and absent:
        backend, reason = next(iter(absent.items()))
        raise InputError(f"--backends {backend} cannot run {op} on {device} {dtype}: {reason}")
    return [name for name in reasons if name not in absent], absent


def automatic(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend of a user who forces none."""
    with variable("LIAR_BACKEND", None):
        return backends.select(op, device, dtype).backend


def broken(absent: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Of what is absent, by dtype and backend, what failed its self-test: a problem."""
    return [
        f"{backend} for {dtype}: {reason}"
        for dtype, own in absent.items()
        for backend, reason in own.items()
        if SELF_TEST in reason
    ]

"""`--round-to auto`: the multiple that FFN widths become, by what a device likes.

An integer is itself. `auto` is a default for the kind of device, and a file of `liar bench align`
says what was measured on one. Both are lowered for models so narrow that it would change how much
is pruned: a step is at most a `SMALLEST_SHARE` of a layer's width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from liar_ext.benchmark_file import read_benchmark
from liar_ext.errors import InputError

VERSION = 1
AUTO = "auto"
# docs/speed.md has the measurements, and what is not one
DEFAULTS = {"cpu": 16, "cuda": 64}
# rounding to the nearest changes a width by at most half of this
SMALLEST_SHARE = 1 / 32
HOW = "make one with: liar bench align --out FILE"


def granule(wanted: int, width: int) -> int:
    """`wanted`, or the largest power of two below it that is no more than a share of `width`.

    Args:
        wanted: multiple that the device likes, at least 1. width: of the dense FFN.
    """
    found = wanted
    while found > 1 and found > width * SMALLEST_SHARE:
        found //= 2
    return found


def wanted(word: str, device_type: str) -> int:
    """What `auto`, or a file, says of a device.

    Raises:
        InputError: the file is missing, damaged or no such result.
    """
    if word == AUTO:
        return DEFAULTS[device_type]
    where = f"--round-to {word}"
    data, _ = read_benchmark(
        word,
        where,
        benchmark="align",
        version=VERSION,
        what="result of liar bench align",
        how=HOW,
        missing="neither a number nor auto, and no such file",
    )
    found: Any = data.get("granule")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise InputError(f"{where}: its granule {found!r} is no number of at least 1; {HOW}")
    return found


def round_to_for(
    word: str, source: str | Path, device: str = "auto", *, trace: bool = False
) -> int:
    """The whole number that a `--round-to` means for a checkpoint.

    Args:
        word: a number, `auto`, or a file; source: folder or hub id, of which the config is read.
        device: `auto`, `cpu` or `cuda`; which default counts. Of no matter for a file.
        trace: as `compress` will get it.
    Raises:
        InputError: a word that means nothing, or a model without an FFN that can be pruned.
    """
    if word.lstrip("+-").isdecimal():
        return int(word)
    from liar_ext.checkpoint.load import resolve
    from liar_ext.engine.inputs import resolve_device
    from liar_ext.engine.source import with_trace
    from liar_ext.models import adapter_for, layout
    from liar_ext.planning import dense_config

    multiple = wanted(word, resolve_device(device).type)
    data = dense_config(resolve(source, config_only=True))
    model = layout.empty_model(layout.config_object(with_trace(data, () if trace else None)))
    layers = range(len(adapter_for(model.config).chain(model)))
    widths = [
        site.units
        for index in layers
        for site in adapter_for(model.config).sites_of(model, index, ("ffn",))
    ]
    if not widths:
        raise InputError(f"--round-to {word}: {source} has no FFN; leave it out")
    return granule(multiple, min(widths))

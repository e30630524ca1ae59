"""Do the calibration and the evaluation text coincide? A small sketch answers without the text.

A report keeps `sketch(corpus)` of what it was calibrated on; an evaluation, perhaps on another
machine and a year later, compares its own text with that.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from liar_ext.calibration.sources import Corpus

SKETCH_SIZE = 512
THRESHOLD = 0.01
# headings and "Yes ." occur everywhere: only longer lines say that two texts share a source
_LONG_LINE = 40
_SHORT_LINE = 20
_WINDOW = 64


def sketch(source: Corpus | Iterable[str]) -> list[str]:
    """The bottom-k sketch of a text: its `SKETCH_SIZE` smallest distinct line hashes.

    Lines are compared after whitespace normalisation and count from 40 characters on; a text with
    fewer than `SKETCH_SIZE` such lines (short sentences, as in STS-B) also counts those of 20 to
    39. Token ids are cut into windows of 64, so only windows cut at the same places match. A hash
    is uniform, so the smallest ones are a uniform sample of the distinct lines.

    Returns:
        At most `SKETCH_SIZE` hexadecimal 64-bit hashes, ascending; [] when no line is long enough.
    Source:
        Cohen and Kaplan, Summarizing data using bottom-k sketches, PODC 2007.
    """
    long_lines: set[int] = set()
    short_lines: set[int] = set()
    for line, is_long in _lines(source):
        (long_lines if is_long else short_lines).add(_hash(line))
    lines = long_lines if len(long_lines) >= SKETCH_SIZE else long_lines | short_lines
    return [f"{value:016x}" for value in heapq.nsmallest(SKETCH_SIZE, lines)]


def overlap(sketched: Iterable[str], source: Corpus | Iterable[str]) -> float:
    """Estimate the fraction of the sketched text's distinct lines that occur in `source`.

    Estimator: `|sketch ∩ H(source)| / |sketch|`, where `H(source)` hashes every line of `source`
    of 20 characters or more. Membership is exact and the sketch a uniform sample of `k` lines, so
    the estimate is unbiased with standard error `sqrt(p (1 − p) / k)`: 0.4 points at p = 1 % and
    k = 512.

    Returns:
        A number in [0, 1]; 0 for an empty sketch.
    """
    wanted = {int(value, 16) for value in sketched}
    if not wanted:
        return 0.0
    found = {value for line, _ in _lines(source) if (value := _hash(line)) in wanted}
    return len(found) / len(wanted)


def warning(calibration: Mapping[str, Any], corpus: Corpus) -> str | None:
    """One line to show when `corpus` is not held out from the calibration, else None.

    Args:
        calibration: `Calibration.to_json()`, as kept in a report; keys that are missing are
            skipped, so that a report of another version does not stop an evaluation.
        corpus: the evaluation text.
    """
    source = calibration.get("source", "its calibration text")
    if calibration.get("sha256") == corpus.sha256:
        return (
            f"{corpus.name} is the text the model was calibrated on ({source}); "
            "this is not a held-out number"
        )
    shared = overlap(calibration.get("sketch") or (), corpus)
    if shared < THRESHOLD:
        return None
    return (
        f"about {100 * shared:.0f} % of the calibration lines ({source}) occur in {corpus.name}; "
        "the number is not fully held out"
    )


def _lines(source: Corpus | Iterable[str]) -> Iterator[tuple[bytes, bool]]:
    """The lines that count, normalised, each with whether it is a long one."""
    if isinstance(source, Corpus) and source.tokens is not None:
        yield from _token_windows(source)
        return
    documents = source.documents if isinstance(source, Corpus) else source
    for document in documents:
        for raw in document.split("\n"):
            line = " ".join(raw.split())
            if len(line) >= _SHORT_LINE:
                yield line.encode(), len(line) >= _LONG_LINE


def _token_windows(corpus: Corpus) -> Iterator[tuple[bytes, bool]]:
    assert corpus.tokens is not None
    ids, mask = corpus.tokens.input_ids, corpus.tokens.attention_mask
    for index, row in enumerate(ids if ids.dim() == 2 else [ids]):
        valid = row if mask is None else row[mask[index]]
        for window in valid.split(_WINDOW):
            yield window.numpy().tobytes(), window.numel() == _WINDOW


def _hash(line: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "big")

"""STS-B: does the cosine of two sentence embeddings rank pairs as people do?"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from liar_ext.calibration.records import read_bytes
from liar_ext.calibration.sources import Corpus, csv_rows, is_number
from liar_ext.errors import InputError
from liar_ext.evaluation.estimate import LEVEL, Estimate, normal_quantile
from liar_ext.evaluation.mode import inference

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class StsbSet:
    """The pairs of one file.

    Attributes:
        name: of the file, as the user gave it; sha256: hex digest of its bytes.
        pairs, scores: in the order of its lines.
    """

    name: str
    pairs: tuple[tuple[str, str], ...]
    scores: tuple[float, ...]
    sha256: str

    def corpus(self) -> Corpus:
        """The sentences, for `calibration.overlap`."""
        documents = tuple(sentence for pair in self.pairs for sentence in pair)
        return Corpus(self.name, "csv", self.sha256, documents)


@dataclass(frozen=True)
class StsbResult:
    """A rank correlation, with its uncertainty.

    Attributes:
        spearman: Spearman's rank correlation × 100.
        pairs: sentence pairs compared.
        standard_error: of `spearman`, also × 100, by Fisher's z with the variance of Bonett and
            Wright (2000): `(1 − ρ²) sqrt((1 + ρ²/2) / (pairs − 3))`; None below 4 pairs.
        seconds: wall-clock time of tokenising, embedding and correlating.
    """

    spearman: float
    pairs: int
    standard_error: float | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def spearman(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path_csv: str | Path,
    batch_size: int = 64,
    max_length: int = 256,
) -> StsbResult:
    """Spearman × 100 between cosine similarities and human scores: `correlation` without pairs."""
    return correlation(model, tokenizer, path_csv, batch_size, max_length)[1]


def correlation(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path_csv: str | Path | StsbSet,
    batch_size: int = 64,
    max_length: int = 256,
) -> tuple[Estimate, StsbResult]:
    """Spearman × 100 between cosine similarities and human scores, and what each pair does to it.

    An embedding is the mean of `last_hidden_state` over valid tokens. Not normalised by a head or
    a pooler, so the number is that of the encoder's own layers.

    Args:
        path_csv: sentence1,sentence2,score for each line; RFC 4180, no header. Or what
            `read_stsb` made of it.
        max_length: longer sentences are truncated.
    Raises:
        InputError: a malformed file, or a correlation that is not defined.
    """
    data = path_csv if isinstance(path_csv, StsbSet) else read_stsb(path_csv)
    pairs, scores = data.pairs, data.scores
    start = time.perf_counter()
    # a sentence of several pairs is embedded once
    index = {text: i for i, text in enumerate(dict.fromkeys(text for p in pairs for text in p))}
    embedded = embed(model, tokenizer, list(index), batch_size, max_length)
    first = embedded[[index[a] for a, _ in pairs]]
    second = embedded[[index[b] for _, b in pairs]]
    cosine = torch.nn.functional.cosine_similarity(first, second)
    if not bool(cosine.isfinite().all()):
        line = int((~cosine.isfinite()).nonzero()[0]) + 1
        raise InputError(
            f"the embedding of pair {line} of {data.name} is not finite; "
            "the model's weights or its dtype are broken: try --dtype float32"
        )
    rho = rank_correlation(cosine.numpy(), np.asarray(scores))
    if rho is None:
        raise InputError(
            f"{data.name}: all scores or all similarities are equal, so a rank correlation is not "
            "defined; give pairs with different scores"
        )
    error = None
    if len(pairs) > 3:
        error = 100 * (1 - rho**2) * float(np.sqrt((1 + rho**2 / 2) / (len(pairs) - 3)))
    result = StsbResult(100 * rho, len(pairs), error, time.perf_counter() - start)
    return _estimate(result, cosine.numpy(), np.asarray(scores)), result


def _estimate(result: StsbResult, x: NDArray[Any], y: NDArray[Any]) -> Estimate:
    """With Fisher's interval, which the result's error is of, and jackknifed pairs."""
    rho, n = result.spearman / 100, result.pairs
    interval = None
    if n > 3 and abs(rho) < 1:
        middle = float(np.arctanh(rho))
        half = normal_quantile() * float(np.sqrt((1 + rho**2 / 2) / (n - 3)))
        interval = (100 * float(np.tanh(middle - half)), 100 * float(np.tanh(middle + half)))
    without = 100 * leave_one_out(x, y)
    units = n * result.spearman - (n - 1) * without
    method = f"{100 * LEVEL:g} % Fisher's z with the variance of Bonett and Wright"
    return Estimate(
        value=result.spearman,
        standard_error=result.standard_error,
        interval=interval,
        method=method,
        units=units,
    )


def leave_one_out(x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.float64]:
    """Spearman's ρ without each of the pairs in turn, (n,); 0 where that is not defined.

    Without pair i, the rank of j falls by 1 where it was above i's, and by 1/2 where the two shared
    it, so no sorting is needed again: O(n²) in time, O(n) in memory.
    """
    a, b = _average_ranks(x), _average_ranks(y)
    found = np.zeros(len(a))
    for i in range(len(a)):
        u, v = (np.delete(r - ((r > r[i]) + 0.5 * (r == r[i])), i) for r in (a, b))
        u, v = u - u.mean(), v - v.mean()
        scale = float(np.sqrt((u @ u) * (v @ v)))
        found[i] = u @ v / scale if scale else 0.0
    return found


def read_stsb(path_csv: str | Path) -> StsbSet:
    """The sentence pairs and their scores; raises InputError naming the line."""
    pairs: list[tuple[str, str]] = []
    scores: list[float] = []
    path = Path(path_csv).expanduser()
    raw = read_bytes(str(path_csv), path)
    for line, row in csv_rows(path, raw):
        where = f"{path_csv}: line {line}"
        if len(row) != 3:
            raise InputError(f"{where}: {len(row)} columns; give sentence1,sentence2,score")
        if not is_number(row[2]) or not np.isfinite(float(row[2])):
            hint = "; remove the header" if not pairs else ""
            raise InputError(f"{where}: score {row[2]!r} is not a finite number{hint}")
        if not row[0].strip() or not row[1].strip():
            raise InputError(f"{where}: a sentence is empty; remove the pair")
        pairs.append((row[0], row[1]))
        scores.append(float(row[2]))
    digest = hashlib.sha256(raw).hexdigest()
    return StsbSet(str(path_csv), tuple(pairs), tuple(scores), digest)


def embed(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sentences: list[str],
    batch_size: int,
    max_length: int,
) -> Tensor:
    """Mean-pooled embeddings, (sentences, hidden) float64 on the CPU, in the order given."""
    # a model with a head keeps its encoder here; a bare encoder is its own base
    encoder = getattr(model, "base_model", model)
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    chunks = []
    with inference(model) as device:
        for start in range(0, len(order), batch_size):
            texts = [sentences[i] for i in order[start : start + batch_size]]
            batch = tokenizer(
                texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            ).to(device)
            mask = batch["attention_mask"]
            hidden = encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
            weights = mask.to(hidden.device).unsqueeze(-1).double()
            chunks.append(((hidden.double() * weights).sum(1) / weights.sum(1)).cpu())
        embedded = torch.cat(chunks)
        return embedded[torch.tensor(order).argsort()]


def rank_correlation(x: NDArray[Any], y: NDArray[Any]) -> float | None:
    """Spearman's ρ: Pearson's correlation of average ranks; None when one side is constant."""
    a, b = (_average_ranks(values) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else None


def _average_ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks from 1, (n,) float64; equal values share the mean of the ranks they take."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return ranks

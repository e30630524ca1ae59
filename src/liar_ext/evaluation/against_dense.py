"""A pruned model against the dense one it comes from, question by question: stability."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liar_ext.checkpoint.load import load
from liar_ext.engine.inputs import load_tokenizer
from liar_ext.errors import InputError
from liar_ext.evaluation.beside import forget
from liar_ext.evaluation.choice_scores import ChoiceScores, ChoicesResult, result_of, score
from liar_ext.evaluation.choice_tokens import EncodedSet, encode
from liar_ext.evaluation.choices import ChoiceSet
from liar_ext.evaluation.limits import limits_of
from liar_ext.evaluation.stability import effective_sample_size, item_weights, stability
from liar_ext.evaluation.task import ENCODER, known

_ACCURACIES = ("accuracy", "accuracy_norm", "accuracy_ppl")


@dataclass(frozen=True)
class Weighted:
    """Stability under one kind of weights.

    Attributes:
        stability: weight of the items of which both models are right or both are wrong, in percent.
        legacy: what LLM-Streamline's repository computes, in percent.
        effective_sample_size: `1 / Σ w²`, in items.
    """

    stability: float
    legacy: float
    effective_sample_size: float


@dataclass(frozen=True)
class SetStability:
    """Two models on one set.

    Attributes:
        file: as the user gave it.
        dense, pruned: what each of them gets.
        agreement: items of which both are right or both are wrong, in percent.
        by_loss: weighted by the spread of the dense model's text losses, as published.
        by_perplexity: weighted by the spread of their exponentials.
    """

    file: str
    dense: ChoicesResult
    pruned: ChoicesResult
    agreement: float
    by_loss: Weighted
    by_perplexity: Weighted


def against_dense(
    dense: Path,
    pruned: Path,
    sets: Sequence[ChoiceSet],
    *,
    seq_len: int | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Stability of a pruned model on multiple-choice sets, as JSON data.

    Right is who gives the right option the lowest text loss (`accuracy_ppl`). One model is in
    memory at a time: the dense one is scored on all sets first.

    Args:
        dense, pruned: folders, dense or pruned; both decoders with tokenizers that cut the
            questions alike.
        seq_len: tokens of a question with an answer at most; what both models take where it is
            None or more.
        device, dtype: as for `liar_ext.load`.
    Returns:
        `stability`, `legacy`, `effective_sample_size` and `agreement`, and under `by_perplexity`
        the first three once more: means over the sets, each set weighing the same. The effective
        sample size of such a mean is `n² / Σ 1/ESS`, that of its weights. `dense` and `pruned` hold
        mean accuracies, `sets` a `SetStability` of each set, `items` how many there are in all.
    Raises:
        InputError: a folder or a set cannot be used.
    """
    if not sets:
        raise InputError("--stability is missing: give one file or more")
    limits = [seq_len, *(_positions(folder) for folder in (dense, pruned))]
    limit = min((each for each in limits if each is not None), default=None)
    encoded = _encoded(sets, dense, pruned, limit)
    scores = [_scores(folder, encoded, batch_size, device, dtype) for folder in (dense, pruned)]
    found = [_one(*each) for each in zip(encoded, *scores, strict=True)]
    return {
        **_mean(found, lambda one: one.by_loss),
        "by_perplexity": _mean(found, lambda one: one.by_perplexity),
        "agreement": sum(one.agreement for one in found) / len(found),
        "items": sum(one.dense.items for one in found),
        "dense": {"source": str(dense), **_accuracies([one.dense for one in found])},
        "pruned": {"source": str(pruned), **_accuracies([one.pruned for one in found])},
        "sets": [asdict(one) for one in found],
    }


def _positions(folder: Path) -> int | None:
    """The longest input of a decoder; refuses what is none."""
    limits = limits_of(folder)
    if not limits.decoder:
        raise InputError(
            f"{folder}: a {limits.model_type} model has no stability, which compares what decoders "
            f"answer; it is evaluated with {known(model=ENCODER)}"
        )
    return limits.positions


def _encoded(
    sets: Sequence[ChoiceSet], dense: Path, pruned: Path, limit: int | None
) -> list[EncodedSet]:
    """The sets as the tokens that both models' tokenizers make of them."""
    tokenizers = [load_tokenizer(folder) for folder in (dense, pruned)]
    found = []
    for choices in sets:
        one, other = (encode(choices, tokenizer, limit) for tokenizer in tokenizers)
        if one.rows != other.rows:
            differ = next(a for a, b in zip(one.items(), other.items(), strict=True) if a != b)
            raise InputError(
                f"{differ[0].where}: the tokenizers of {dense} and {pruned} cut this question "
                "differently, so losses a token cannot be compared; give models with one tokenizer"
            )
        found.append(one)
    return found


def _scores(
    folder: Path,
    encoded: Sequence[EncodedSet],
    batch_size: int,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> list[ChoiceScores]:
    """What one model gives all sets; it is out of memory afterwards."""
    model = load(folder, dtype=dtype, device=device)
    try:
        return [score(model, one, batch_size) for one in encoded]
    finally:
        del model
        forget()


def _one(encoded: EncodedSet, dense: ChoiceScores, pruned: ChoiceScores) -> SetStability:
    right = [scores.correct()["accuracy_ppl"] for scores in (dense, pruned)]
    return SetStability(
        file=encoded.choices.name,
        dense=result_of(encoded, dense),
        pruned=result_of(encoded, pruned),
        agreement=100 * float((right[0] == right[1]).double().mean()),
        by_loss=_weighted(dense.text_loss, *right),
        by_perplexity=_weighted(dense.text_loss.exp(), *right),
    )


def _weighted(scores: Tensor, dense: Tensor, pruned: Tensor) -> Weighted:
    return Weighted(
        stability=100 * stability(scores, dense, pruned),
        legacy=100 * stability(scores, dense, pruned, legacy=True),
        effective_sample_size=effective_sample_size(item_weights(scores)),
    )


def _mean(
    found: Sequence[SetStability], of: Callable[[SetStability], Weighted]
) -> dict[str, float]:
    """Every set weighs the same."""
    parts, count = [of(one) for one in found], len(found)
    return {
        "stability": sum(part.stability for part in parts) / count,
        "legacy": sum(part.legacy for part in parts) / count,
        "effective_sample_size": count**2 / sum(1 / part.effective_sample_size for part in parts),
    }


def _accuracies(results: Sequence[ChoicesResult]) -> Mapping[str, float]:
    return {name: sum(getattr(one, name) for one in results) / len(results) for name in _ACCURACIES}

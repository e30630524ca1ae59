"""The workloads of `liar bench serve`: random tokens, so many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from liar_ext.bench.serve_models import Outline
from liar_ext.errors import InputError

DEFAULT_PROMPTS = (128, 512)


@dataclass(frozen=True)
class Work:
    """Attributes:
    batch: sequences at a time; prompt: tokens of each, of an encoder's sentences too.
    new_tokens: generated after them; 0 for an encoder.
    """

    batch: int
    prompt: int
    new_tokens: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def drawn(batch: int, length: int, vocabulary: int, device: torch.device) -> Tensor:
    """Token ids (batch, length) int64, the same for all models; 0 to 2 are often special."""
    generator = torch.Generator().manual_seed(0)
    least = min(3, vocabulary - 1)
    return torch.randint(least, vocabulary, (batch, length), generator=generator).to(device)


def workloads(
    models: Sequence[Outline],
    batches: Sequence[int],
    prompts: Sequence[int] | None,
    new_tokens: int,
) -> list[Work]:
    """Every batch with every length, the smallest first.

    Args:
        prompts: None for the usual ones, cut to what all models take.
    Raises:
        InputError: a number below 1, or more tokens than a model takes.
    """
    kinds = {model.kind for model in models}
    if len(kinds) > 1:
        named = ", ".join(f"{model.name} ({model.kind})" for model in models)
        raise InputError(f"a decoder and an encoder have no speed in common: {named}")
    decoder = kinds == {"decoder"}
    if decoder and new_tokens < 2:
        raise InputError(
            f"--new-tokens {new_tokens}: must be at least 2, for the first comes with the prompt"
        )
    for option, values in (("batch", batches), ("prompt", prompts or (1,))):
        if min(values) < 1:
            raise InputError(f"--{option} {min(values)}: must be at least 1")
    new = new_tokens if decoder else 0
    limits = {m.name: m.positions - new for m in models if m.positions is not None}
    least = min(limits, key=lambda name: limits[name]) if limits else None
    if least is not None and max(prompts or (1,)) > limits[least]:
        after = f" with --new-tokens {new}" if new else ""
        fits = f"at most {limits[least]}" if limits[least] > 0 else "fewer --new-tokens"
        raise InputError(
            f"--prompt {max(prompts or (1,))}{after}: {least} takes {limits[least] + new} tokens "
            f"in all; give {fits}"
        )
    if prompts is None:
        cut = DEFAULT_PROMPTS if least is None else (min(p, limits[least]) for p in DEFAULT_PROMPTS)
        prompts = tuple(cut)
    return list(_every(sorted(set(batches)), sorted(set(prompts)), new))


def _every(batches: Sequence[int], prompts: Sequence[int], new: int) -> Iterator[Work]:
    # a process gives back less than it has had: what is larger comes later
    pairs = sorted(((b, p) for b in batches for p in prompts), key=lambda pair: pair[0] * pair[1])
    return (Work(batch, prompt, new) for batch, prompt in pairs)

"""How far a model's next-token distributions are from another one's, over a text.

For each predicted token t of each window, with p the reference's distribution and q the model's:

    KL_t = Σ_v p(v) log(p(v) / q(v))          in nats
    top1_t = 1 where argmax p = argmax q

Means over a window's tokens, then over windows, as a perplexity's. Logits are there for one batch
at a time: both models are asked in turn, or, when only one of them fits into memory, the
reference's last hidden states wait on disk, and its head makes the same logits of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from liar_ext.errors import InputError
from liar_ext.evaluation.mode import embedding_of, inference
from liar_ext.evaluation.perplexity import check_model, check_windows, cut, logits_of, positions

# logits of a batch of windows, (b, t, vocabulary); the first argument is the batch's place
Reference = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Agreement:
    """What a model has of a reference, window by window; (windows,) float64 each.

    Attributes:
        divergence: mean KL(reference ‖ model), in nats a token.
        top1: share of the tokens for which both think the same most likely, percent.
        loss, reference_loss: mean next-token losses of the two, in nats.
        seconds: wall-clock time of the forward passes and all of this.
    """

    divergence: Tensor
    top1: Tensor
    loss: Tensor
    reference_loss: Tensor
    seconds: float


def agreement(
    model: nn.Module,
    reference: Reference,
    token_ids: Tensor,
    seq_len: int,
    batch_size: int = 1,
) -> Agreement:
    """Divergence and top-1 agreement of a causal language model with a reference.

    Distributions are float32, in chunks of positions; sums are float64. A token that the reference
    rules out (a logit of −∞) adds 0.

    Args:
        model: called as `model(input_ids=...)`, returns `.logits` (b, t, vocabulary).
        reference: `live(dense)` or `recorded(...)`, for the same windows and batch size.
        token_ids: (n,) int64, cut as for a perplexity.
    Raises:
        InputError: as `perplexity`; the vocabularies differ; a divergence is not finite.
    """
    windows = cut(token_ids, seq_len, batch_size)
    check_model(model, windows)
    parts: list[Tensor] = []
    start = time.perf_counter()
    with inference(model) as device:
        for index, ids in enumerate(windows.split(batch_size)):
            ids = ids.to(device)
            wanted = reference(index, ids)
            parts.append(_compared(logits_of(model, ids), wanted, ids).cpu())
    columns = torch.cat(parts, 1) / (seq_len - 1)
    check_windows(columns)
    divergence, top1, loss, reference_loss = columns
    seconds = time.perf_counter() - start
    return Agreement(divergence, 100 * top1, loss, reference_loss, seconds)


def live(dense: nn.Module) -> Reference:
    """A reference that is in memory too. It must be in evaluation mode."""

    def asked(index: int, ids: Tensor) -> Tensor:
        embedding = embedding_of(dense)
        weights = dense.parameters() if embedding is None else embedding.parameters()
        first = next(iter(weights), ids)
        return logits_of(dense, ids.to(first.device))

    return asked


def recorded(
    dense: nn.Module, token_ids: Tensor, seq_len: int, batch_size: int, folder: Path
) -> Reference:
    """A reference whose model may go: only its head stays.

    Its hidden states are written to `folder`, a file a batch: `tokens · hidden size` numbers in its
    dtype in all, never logits.

    Args:
        dense: with an output embedding that makes its logits and nothing behind it, which is
            checked on the first batch.
    Raises:
        InputError: there is no such embedding; or as `perplexity`.
    """
    get = getattr(dense, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None:
        raise InputError(
            f"{type(dense).__name__} has no output embedding, so it cannot go before the other "
            "model comes; leave --one-at-a-time"
        )
    windows = cut(token_ids, seq_len, batch_size)
    check_model(dense, windows)
    given: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    try:
        with inference(dense) as device:
            for index, ids in enumerate(windows.split(batch_size)):
                given.clear()
                logits = logits_of(dense, ids.to(device))
                states = given[0].detach()
                if not index and not torch.equal(head(states), logits):
                    raise InputError(
                        f"{type(dense).__name__} changes its logits behind the output embedding; "
                        "leave --one-at-a-time"
                    )
                _keep(states, _file(folder, index))
    finally:
        hook.remove()
    return _from_disk(head, folder)


def _keep(states: Tensor, file: Path) -> None:
    try:
        save_file({"states": states.contiguous().cpu()}, file)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{file.parent}: hidden states of the dense model cannot wait there ({reason}); give a "
            "--scratch with more room, or fewer --windows"
        ) from error


def _from_disk(head: nn.Module, folder: Path) -> Reference:
    def read(index: int, ids: Tensor) -> Tensor:
        states = load_file(_file(folder, index))["states"]
        weight = next(head.parameters())
        with torch.no_grad():
            return head(states.to(weight.device))

    return read


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index}.safetensors"


def _compared(logits: Tensor, wanted: Tensor, ids: Tensor) -> Tensor:
    """Sums over each window's tokens, (4, b) float64: divergence, top-1, losses of both."""
    if logits.shape[-1] != wanted.shape[-1]:
        raise InputError(
            f"the models have vocabularies of {wanted.shape[-1]} and {logits.shape[-1]}; give a "
            "model and what it was made from"
        )
    batch = len(ids)
    total = torch.zeros(4, batch, dtype=torch.float64, device=logits.device)
    for part in positions(logits):
        targets = ids[:, part.start + 1 : part.stop + 1].to(logits.device)
        q = logits[:, part].float().log_softmax(-1)
        p = wanted[:, part].to(logits.device).float().log_softmax(-1)
        terms = F.kl_div(q, p, reduction="none", log_target=True)
        terms.masked_fill_(p == -torch.inf, 0.0)
        same = p.argmax(-1) == q.argmax(-1)
        losses = [-each.gather(-1, targets[..., None])[..., 0] for each in (q, p)]
        found: Sequence[Any] = (terms.sum(-1), same, *losses)
        total += torch.stack([each.double().sum(1) for each in found])
    return total

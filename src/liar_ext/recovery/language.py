"""Windows of a text, and the loss of their next tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from liar_ext.calibration.batch import Batch
from liar_ext.calibration.batches import Calibration, make_batches
from liar_ext.calibration.sources import Corpus
from liar_ext.engine.loss import NO_TARGET, next_tokens, predicts
from liar_ext.errors import InputError, UnsupportedModelError
from liar_ext.models import adapter_for, check_reads_tokens, text_config
from liar_ext.ops.logits import chunks, logits
from liar_ext.recovery.train import Loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def windows_of(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    *,
    wanted: int,
    held_out: int,
    seq_len: int,
    seed: int,
) -> tuple[Batch, Batch | None, Calibration]:
    """Windows to train on and windows held out, drawn by seed, none in both.

    Args:
        corpus, tokenizer, seq_len, seed: as of `make_batches`, packed.
        wanted: windows that the training has use for; fewer are used again.
        held_out: windows to measure on; where the text has not enough for both, a tenth of it at
            most.
    Returns:
        (n, t) for training, (m, t) held out or None, and what a report says of both.
    Raises:
        InputError: as `make_batches`; or one window in all where some are to be held out.
    """
    found = make_batches(
        corpus,
        tokenizer,
        packed=True,
        samples=wanted + held_out,
        seq_len=seq_len,
        batch_size=wanted + held_out,
        seed=seed,
        vocab_size=text_config(model.config).vocab_size,
    )
    (all_of_them,) = found.batches
    ids, mask = all_of_them.input_ids, all_of_them.attention_mask
    if held_out and len(ids) < 2:
        raise InputError(
            f"{corpus.name}: one window of {seq_len} tokens, and some are held out; give a longer "
            "text or shorter windows (--seq-len)"
        )
    chosen = held_apart(len(ids), wanted, held_out)
    kept_apart = Batch(ids[chosen], mask[chosen]) if held_out else None
    return Batch(ids[~chosen], mask[~chosen]), kept_apart, found


def held_apart(available: int, wanted: int, held_out: int) -> Tensor:
    """Which windows are held out, (available,) bool: a tenth at most where there are not enough.

    Spread over the order, which for windows with padding is by length.
    """
    chosen = torch.zeros(available, dtype=torch.bool)
    if held_out and available < wanted + held_out:
        held_out = min(held_out, max(available // 10, 1))
    if held_out:
        chosen[torch.linspace(0, available - 1, held_out).round().long()] = True
    return chosen


def next_token_loss(model: PreTrainedModel) -> Callable[[Batch], Loss]:
    """The summed cross-entropy of the next tokens, with what `train` needs of it.

    Where the head makes the logits of the last hidden states alone, a chunk of positions has
    logits at a time, forward and backward: a vocabulary of 128k takes 1 GiB for 2048 positions
    otherwise. Its own parameters may be trained as well.

    Raises:
        InputError: the model has no head that predicts a next token.
    """
    check_reads_tokens(model.config, "training on a text")
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise InputError(
            f"{type(model).__name__} predicts no next token; only decoders with a language-model "
            "head can be trained on text"
        )
    try:
        adapter = adapter_for(model.config)
    except UnsupportedModelError:
        adapter = None
    if adapter is None or not predicts(model, adapter):
        return lambda batch: _whole(model, batch)
    head = adapter.head(model)
    backbone = adapter.backbone(model)[1]

    def loss(batch: Batch) -> Loss:
        device = model.device
        mask = batch.mask_on(device)
        states = backbone(
            input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False
        )[0]
        targets = next_tokens(batch).to(states.device).flatten()
        flat = states.flatten(0, 1)
        total = torch.zeros((), device=states.device)
        for rows in chunks(head, len(flat)):
            total = total + checkpoint(
                _cross_entropy, head, flat[rows], targets[rows], use_reentrant=False
            )
        return Loss(total, int((targets != NO_TARGET).sum()))

    return loss


def _cross_entropy(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(
        logits(head, states).float(), targets, ignore_index=NO_TARGET, reduction="sum"
    )


def _whole(model: PreTrainedModel, batch: Batch) -> Loss:
    """By the model's own forward: its family, or what it makes of its head, is not known."""
    device = model.device
    mask = batch.mask_on(device)
    found = model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False).logits
    targets = next_tokens(batch).to(found.device)
    total = F.cross_entropy(
        found.float().flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="sum"
    )
    return Loss(total, int((targets != NO_TARGET).sum()))

"""The loss of the next token, and its gradient where a language-model head begins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from liar_ext.calibration.batch import Batch
from liar_ext.models import Adapter
from liar_ext.ops.logits import chunks, logits

# what `cross_entropy` leaves out
NO_TARGET = -100


def predicts(model: PreTrainedModel, adapter: Adapter) -> bool:
    """Whether the model's head makes the logits of the next token of its last hidden states."""
    head = model.get_output_embeddings()
    decodes = adapter.decoder or adapter.then is not None
    return decodes and adapter.plain_head and head is not None


def loss_gradient(head: nn.Module, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy of a language-model head, and its gradient.

    Logits are made in chunks of positions (`ops.logits`), which take about three times as much with
    their gradient.

    Args:
        states: (b, t, d), what the head is given; targets: (b, t) int64, -100 for none.
    Returns:
        the gradient with respect to `states`, in their dtype, and the sum, float64.
    """
    flat, wanted = states.flatten(0, 1), targets.flatten()
    gradient = torch.empty_like(flat)
    total = torch.zeros((), dtype=torch.float64, device=states.device)
    for rows in chunks(head, len(flat)):
        own = flat[rows].detach().requires_grad_()
        with torch.enable_grad():
            loss = _cross_entropy(logits(head, own), wanted[rows])
        (gradient[rows],) = torch.autograd.grad(loss, own)
        total += loss.detach()
    return gradient.view_as(states), total


def loss_sum(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    """The sum alone, float64; arguments as of `loss_gradient`."""
    flat, wanted = states.flatten(0, 1), targets.flatten()
    total = torch.zeros((), dtype=torch.float64, device=states.device)
    for rows in chunks(head, len(flat)):
        total += _cross_entropy(logits(head, flat[rows]), wanted[rows])
    return total


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, ignore_index=NO_TARGET, reduction="sum")


def next_tokens(batch: Batch) -> Tensor:
    """The token that follows each, (b, t) int64; none after the last, beside padding, and where the
    batch says that it does not count. Of an encoder-decoder those that its decoder reads."""
    batch = batch.parts[-1]
    targets = torch.full_like(batch.input_ids, NO_TARGET)
    valid = batch.attention_mask[:, :-1] & batch.attention_mask[:, 1:]
    if batch.answers is not None:
        valid = valid & batch.answers[:, 1:]
    targets[:, :-1] = torch.where(valid, batch.input_ids[:, 1:], NO_TARGET)
    return targets

"""What a forward holds that stands at a Site is what plans count, in every family."""

from __future__ import annotations

import pytest
import torch
from liar_families import FAMILIES
from torch import Tensor

from liar_ext.calibration.batch import Batch
from liar_ext.costs import held_beside, producer_rows
from liar_ext.engine import capture
from liar_ext.engine.calls import record_calls
from liar_ext.engine.capture import LayerRun, pausing
from liar_ext.engine.shelf import Item
from liar_ext.evaluation.mode import inference
from liar_ext.models import adapter_for, text_config

LENGTH = 32


class _Counted:
    """Keeps what it is given, and counts the bytes."""

    moves = True

    def __init__(self) -> None:
        self.bytes = 0

    def put(self, tensor: Tensor) -> Item:
        self.bytes += tensor.nbytes
        return _Kept(tensor.clone())


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def fetch(self) -> Tensor:
        return self._tensor.clone()

    def refill(self, target: Tensor) -> None:
        target.view(-1).view(torch.uint8).copy_(self._tensor.view(-1).view(torch.uint8))

    def free(self) -> None: ...


@pytest.mark.parametrize("name", FAMILIES)
def test_no_forward_holds_more_than_is_counted(name, monkeypatch):
    monkeypatch.setattr(capture, "SHELVED_BYTES", 1)
    model = FAMILIES[name].build().eval()
    adapter = adapter_for(model.config)
    layers = adapter.layer_list(model)[1]
    _, backbone = adapter.backbone(model)
    ids = torch.randint(4, text_config(model.config).vocab_size, (2, LENGTH))
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
    device, hidden_size = torch.device("cpu"), text_config(model.config).hidden_size
    with inference(model):
        hidden, calls = record_calls(
            *(backbone, layers, batch, device, adapter.options, adapter.returns),
            hands_on=adapter.hands_on,
        )
        index = len(layers) - 1
        for site in adapter.sites_of(model, index, tuple(s.kind for s in adapter.sites)):
            shelf = _Counted()
            with pausing([site]):
                run = LayerRun(layers[index], _Kept(hidden), calls[index], shelf)
                run.to_next()
                run.shelve()
                run.close()
            held = shelf.bytes / (ids.numel() * hidden.element_size())
            beside = producer_rows(site) if site.kind == "heads" else hidden_size
            counted = site.columns + hidden_size + beside + held_beside(model, site, LENGTH)
            assert held <= counted, f"{site.kind}: {held:.0f} numbers a token, {counted} counted"

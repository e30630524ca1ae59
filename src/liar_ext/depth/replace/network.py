"""What may stand in for a window: layers of the model, whole or without their attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from liar_ext.errors import InputError, UnsupportedModelError
from liar_ext.models import absent, adapter_for, layout
from liar_ext.models.adapter import Adapter
from liar_ext.models.site import SiteSpec


@dataclass(frozen=True)
class Network:
    """What stands in.

    Attributes:
        count: layers, if not said otherwise; several: it may be said otherwise.
        producers: of the FFN that is all of it, two where that is gated; None with attention.
    """

    count: int = 1
    several: bool = False
    producers: int | None = None

    @property
    def attention(self) -> bool:
        return self.producers is None


# LLM-Streamline's MLP and SwiGLU stand alone; here they have a layer's residual and norm, so that
# they learn what the window adds and not to repeat what they are given
NETWORKS = {
    "layer": Network(),
    "layers": Network(2, several=True),
    "swiglu": Network(producers=2),
    "mlp": Network(producers=1),
}


def check_network(name: str, model: PreTrainedModel) -> None:
    """Whether layers of a model can be such a network; works on `meta`.

    Raises:
        InputError: the family has another FFN, no adapter, or layers that cannot go without
            attention.
    """
    network = NETWORKS[name]
    if network.attention:
        return
    try:
        adapter = adapter_for(model.config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"--network {name}: {error}; use layer") from error
    ffn = _site(adapter, "ffn")
    if ffn is None or _heads(adapter) is None:
        raise InputError(
            f"--network {name}: a {adapter.model_type} layer cannot go without attention; use layer"
        )
    if len(ffn.producers) != network.producers:
        own = next(
            (n for n, other in NETWORKS.items() if other.producers == len(ffn.producers)), "layer"
        )
        raise InputError(
            f"--network {name}: the FFN of a {adapter.model_type} layer is "
            f"{'gated' if len(ffn.producers) == 2 else 'not gated'}; use {own}"
        )


def networked(
    data: dict[str, Any], model: PreTrainedModel, places: Sequence[int]
) -> dict[str, Any]:
    """The `config.json` of a model some of whose layers have no attention.

    Args:
        data: of the model with it, also with the `liar_ext` key; model: that, also on `meta`.
        places: of the layers without.
    """
    if layout.KEY in data:
        new = copy.deepcopy(data)
        widths = new[layout.KEY]["layers"]
    else:
        widths = layout.read(model)
    for place in places:
        widths[place]["heads"] = 0
    if layout.KEY in data:
        return new
    return layout.describe(data, adapter_for(model.config), widths, None, [])


def remove_attention(layer: nn.Module, adapter: Adapter) -> None:
    """Make a layer its FFN, with its norm and the residual; the bias of its attention stays."""
    heads = _heads(adapter)
    assert heads is not None, "see `check_network`"
    assert heads.block is not None, "see `check_network`"
    if not heads.absent(layer):
        absent.remove(layer, heads.block, heads.consumer)


@torch.no_grad()
def random_weights(
    layer: nn.Module, deviation: float, seed: int, norm: float = 1.0
) -> dict[str, Tensor]:
    """First weights of a layer that inherits nothing, by name, float32, on the CPU.

    Matrices are N(0, deviation²), norms neutral, biases 0. The seed alone decides.

    Args:
        layer: of these parameters, also on `meta`; norm: see `Adapter.neutral_norm`.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in layer.named_parameters():
        shape = parameter.shape
        if parameter.dim() > 1:
            found[name] = torch.randn(shape, generator=generator) * deviation
        else:
            found[name] = torch.full(shape, 0.0 if name.endswith("bias") else norm)
    return found


def _site(adapter: Adapter, kind: str) -> SiteSpec | None:
    return next((spec for spec in adapter.sites if spec.kind == kind), None)


def _heads(adapter: Adapter) -> SiteSpec | None:
    """The attention, where it can go."""
    found = _site(adapter, "heads")
    return found if found is not None and found.block is not None else None

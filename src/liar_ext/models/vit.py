"""ViT: images, as patches and one token of its own; pre-norm, biases everywhere, no mask."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from liar_ext.models.absent import Block
from liar_ext.models.adapter import Adapter, Features
from liar_ext.models.llama import explicit_head_dim
from liar_ext.models.site import Producer, SiteSpec


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _shape(config: PretrainedConfig) -> tuple[int, ...]:
    return (config.num_channels, *_pair(config.image_size))


def _length(config: PretrainedConfig) -> int:
    """Patches of an image, and the token that stands for all of it."""
    (height, width), (high, wide) = _pair(config.image_size), _pair(config.patch_size)
    return (height // high) * (width // wide) + 1


VIT = Adapter(
    model_type="vit",
    layers="layers",
    sites=(
        SiteSpec(
            kind="heads",
            consumer="attention.o_proj",
            producers=tuple(Producer(f"attention.{p}_proj") for p in "qkv"),
            attributes=(("attention", "num_attention_heads", "units"),),
            config_fields={"num_attention_heads": "units"},
            block=Block("attention", "layernorm_before", pair=True),
        ),
        SiteSpec(
            kind="ffn",
            consumer="mlp.fc2",
            producers=(Producer("mlp.fc1"),),
            config_fields={"intermediate_size": "units"},
            block=Block("mlp", "layernorm_after", pair=False),
        ),
    ),
    decoder=False,
    max_positions=_length,
    explicit=explicit_head_dim,
    residual=lambda config: True,
    features=Features("pixel_values", _shape, _length),
    note="reads images",
)

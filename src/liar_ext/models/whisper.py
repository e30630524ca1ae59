"""The encoder of Whisper: log-mel features of half a minute, always as many; pre-norm. The decoder
stays as it is: it asks the encoder for states of the same width. The config has one number of heads
and no head size, so fewer heads need `liar_ext.load`."""

from __future__ import annotations

from transformers import PretrainedConfig

from liar_ext.models.absent import Block
from liar_ext.models.adapter import Adapter, Features
from liar_ext.models.site import Producer, SiteSpec

# of the second convolution
STRIDE = 2


def _length(config: PretrainedConfig) -> int:
    return int(config.max_source_positions)


WHISPER = Adapter(
    model_type="whisper",
    layers="layers",
    sites=(
        SiteSpec(
            kind="heads",
            consumer="self_attn.out_proj",
            producers=tuple(Producer(f"self_attn.{p}_proj") for p in "qkv"),
            attributes=(("self_attn", "num_heads", "units"),),
            block=Block("self_attn", "self_attn_layer_norm", pair=True),
        ),
        SiteSpec(
            kind="ffn",
            consumer="fc2",
            producers=(Producer("fc1"),),
            config_fields={"encoder_ffn_dim": "units"},
        ),
    ),
    decoder=False,
    max_positions=_length,
    residual=lambda config: True,
    features=Features(
        "input_features",
        lambda config: (config.num_mel_bins, STRIDE * config.max_source_positions),
        _length,
    ),
    part="encoder",
    note="the encoder; reads log-mel features",
)

"""OPT: ReLU FFN directly in the layer, biases everywhere. Its config cannot state a head size,
so fewer heads need `liar_ext.load`."""

from liar_ext.models.absent import Block
from liar_ext.models.adapter import Adapter
from liar_ext.models.site import Producer, SiteSpec

OPT = Adapter(
    model_type="opt",
    layers="decoder.layers",
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
            config_fields={"ffn_dim": "units"},
        ),
    ),
    decoder=True,
    residual=lambda config: config.do_layer_norm_before,
)

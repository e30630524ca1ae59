"""What a model is evaluated as is what its logits show."""

import pytest
import torch
import transformers
from liar_depth import MODELS, build
from liar_families import randomise

from liar_ext.errors import InputError
from liar_ext.evaluation.limits import is_decoder, kind_of, limits_of, max_positions

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
ELECTRA = {**SMALL, **HEADS, "embedding_size": 32}
# families without an adapter, and those that are encoders or decoders as their config says
OTHERS = {
    "phi": ("PhiForCausalLM", {**SMALL, **HEADS}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mamba": ("MambaForCausalLM", {**SMALL, "state_size": 8}),
    "electra": ("ElectraForMaskedLM", ELECTRA),
    "electra that could generate": ("ElectraForCausalLM", ELECTRA),
    "electra as a decoder": ("ElectraForCausalLM", {**ELECTRA, "is_decoder": True}),
}
UNLIMITED = ("mamba", "bloom")
ENCODERS = ("bert", "electra", "electra that could generate")


def made(name):
    if name in MODELS:
        return build(name)
    architecture, values = OTHERS[name]
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**values)
    config.architectures = [architecture]
    return randomise(model_class(config))


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_a_decoder_is_a_model_whose_logits_see_no_later_token(name, tmp_path):
    model = made(name).eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with torch.no_grad():
        first, second = model(input_ids=ids).logits[:, :3].double()
    seen = float((first - second).norm() / first.norm())
    assert is_decoder(model) is (name not in ENCODERS)
    assert (seen < 1e-6) if is_decoder(model) else (seen > 1e-4)
    model.save_pretrained(tmp_path)
    limits = limits_of(tmp_path)
    assert limits.decoder is is_decoder(model)
    assert limits.positions == max_positions(model) == (None if name in UNLIMITED else 64)
    assert limits.model_type == model.config.model_type


def test_a_headless_decoder_and_an_encoder_decoder(tmp_path):
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    )
    with pytest.raises(InputError, match="T5Model is an encoder-decoder and cannot be evaluated"):
        is_decoder(transformers.T5Model(t5.config))
    assert kind_of(t5) == "encoder-decoder"
    # without a head, only an adapter knows
    phi = transformers.PhiModel(transformers.PhiConfig(**SMALL, **HEADS))
    assert not is_decoder(phi)
    assert is_decoder(transformers.GPTNeoXModel(transformers.GPTNeoXConfig(**SMALL, **HEADS)))

"""Layers without attention or FFN: the dense model whose consumer says nothing but its bias."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from liar_families import LENGTH, randomise
from transformers import PreTrainedModel

import liar_ext
from liar_ext.checkpoint.reader import parameter_count
from liar_ext.errors import InputError
from liar_ext.models import adapter_for, layout
from liar_ext.models.absent import Absent

DECODER = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FALCON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_kv_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
# layers without attention, layers without FFN
GONE = [((0,), ()), ((2,), (0, 3)), ((1, 2), (1,)), ((), (2,))]


def _models() -> dict[str, Any]:
    qwen3 = DECODER | {"head_dim": 12, "use_sliding_window": True, "sliding_window": 8}
    return {
        "llama": transformers.LlamaConfig(**DECODER),
        "llama-biases": transformers.LlamaConfig(**DECODER, attention_bias=True, mlp_bias=True),
        "mistral": transformers.MistralConfig(**DECODER, sliding_window=8),
        "qwen3-mixed": transformers.Qwen3Config(**qwen3, layer_types=SLIDING),
        # normed once more before it is added, by norms of 1 + weight
        "gemma2": transformers.Gemma2Config(
            **DECODER, head_dim=12, sliding_window=8, layer_types=SLIDING, attention_bias=True
        ),
        "phi3": transformers.Phi3Config(**DECODER, pad_token_id=None, sliding_window=8),
        "granite": transformers.GraniteConfig(**DECODER, residual_multiplier=0.4, mlp_bias=True),
        "smollm3": transformers.SmolLM3Config(
            **DECODER, pad_token_id=None, no_rope_layers=[1, 0, 1, 0]
        ),
        # attention and FFN beside each other, behind a norm each and behind one
        "gpt_neox": transformers.GPTNeoXConfig(
            **{k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
        ),
        "falcon": transformers.FalconConfig(**FALCON, new_decoder_architecture=True),
        "falcon-one-norm": transformers.FalconConfig(**FALCON, multi_query=False, bias=True),
        "gpt2": transformers.GPT2Config(
            vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=64, eos_token_id=None
        ),
        "opt": transformers.OPTConfig(
            vocab_size=97,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            eos_token_id=None,
        ),
    }


MODELS = _models()


def _dense(name: str) -> PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name])
    model.config.architectures = [type(model).__name__]
    return randomise(model)


def _data(model: PreTrainedModel, gone: tuple[tuple[int, ...], tuple[int, ...]]) -> dict[str, Any]:
    widths = layout.read(model)
    for kind, layers in zip(("heads", "ffn"), gone, strict=True):
        for layer in layers:
            widths[layer][kind] = 0
    data = model.config.to_dict()
    return layout.describe(data, adapter_for(model.config), widths, None, [])


def _without(name: str, gone: Any, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model without these parts, loaded from a folder; the dense one with silent consumers."""
    dense = _dense(name)
    data = _data(dense, gone)
    made, tensors = layout.build(data), dense.state_dict()
    for parameter, value in list(made.named_parameters(remove_duplicate=False)):
        owner, _, leaf = parameter.rpartition(".")
        assert value.shape in (tensors[parameter].shape, (0,))
        own = tensors[parameter] if value.numel() else torch.empty(0)
        setattr(made.get_submodule(owner), leaf, torch.nn.Parameter(own.clone()))
    made.tie_weights()
    made.save_pretrained(folder)
    adapter = adapter_for(dense.config)
    for kind, layers in zip(("heads", "ffn"), gone, strict=True):
        for layer in layers:
            (site,) = adapter.sites_of(dense, layer, (kind,))
            site.consumer.weight.data.zero_()
    return liar_ext.load(folder), dense


@pytest.mark.parametrize("gone", GONE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_is_the_model_whose_consumer_says_its_bias_only(
    name: str, gone: Any, tmp_path: Path
) -> None:
    if name == "opt" and gone[1]:
        pytest.skip("OPT's FFN is no module of its own")
    model, expected = _without(name, gone, tmp_path)
    tokens = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        now, wanted = model(tokens).logits, expected(tokens).logits
    assert float(wanted.std()) > 1e-3
    assert float((now - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert parameter_count(model) < parameter_count(expected)


@pytest.mark.parametrize("gone", GONE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_generates_with_its_cache_what_it_does_without(
    name: str, gone: Any, tmp_path: Path
) -> None:
    if name == "opt" and gone[1]:
        pytest.skip("OPT's FFN is no module of its own")
    model, dense = _without(name, gone, tmp_path)
    tokens = torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(tokens, use_cache=True, **options)
    plain = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(cached, plain)
    assert torch.equal(cached, dense.generate(tokens, use_cache=True, **options))


def test_layers_with_attention_have_the_first_places_of_their_type() -> None:
    model = layout.build(_data(_dense("qwen3-mixed"), ((2, 1), ())))
    indices = [getattr(layer.self_attn, "layer_idx", None) for layer in model.model.layers]
    # full attention: of the layers 1 and 3 the second is left, and has the place of the first
    assert indices == [0, None, None, 1]
    assert isinstance(model.model.layers[1].self_attn, Absent)


@pytest.mark.parametrize(
    ("name", "gone", "said"),
    [
        ("llama", (0, 1, 2, 3), "no layer with attention would be left"),
        ("qwen3-mixed", (0, 2), "of the type of the first layer (sliding_attention)"),
    ],
)
def test_refuses_what_no_cache_can_count(name: str, gone: tuple[int, ...], said: str) -> None:
    data = _data(_dense(name), (gone, ()))
    with pytest.raises(InputError) as error:
        layout.build(data)
    assert said in str(error.value)


def test_refuses_no_units_where_no_module_is_all_of_the_site() -> None:
    data = _data(_dense("opt"), ((), (1,)))
    with pytest.raises(InputError, match="ffn 0: must be 1 to 48"):
        layout.build(data)


@pytest.mark.parametrize("name", MODELS)
def test_stock_loaders_refuse_it(name: str, tmp_path: Path) -> None:
    _without(name, ((1,), ()), tmp_path)
    with pytest.raises(RuntimeError, match="ize"):
        # as `save_pretrained` of a loaded model writes it, with the family's model_type
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_reads_as_no_units_and_keeps_layers(tmp_path: Path) -> None:
    model, _ = _without("llama", ((1,), (0, 1)), tmp_path)
    widths = layout.read(model)
    assert [own["heads"] for own in widths] == [4, 0, 4, 4]
    assert [own["ffn"] for own in widths] == [0, 0, 48, 48]
    from liar_ext.depth.surgery import surgery

    tokens = torch.arange(3, 20)[None]
    same = surgery(copy.deepcopy(model), [0, 1, 2, 3])
    shorter = surgery(model, [0, 2, 3])
    with torch.no_grad():
        assert torch.equal(same(tokens).logits, model(tokens).logits)
        # layer 1 did nothing
        assert torch.equal(shorter(tokens).logits, model(tokens).logits)


def test_an_encoders_first_layer_has_no_norm_that_could_go(tmp_path: Path) -> None:
    """ModernBERT's attention there: an empty weight of the consumer stops stock loaders."""
    config = transformers.ModernBertConfig(
        **{k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "bos_token_id")},
        pad_token_id=0,
        bos_token_id=0,
        cls_token_id=0,
        sep_token_id=1,
        local_attention=8,
        architectures=["ModernBertForMaskedLM"],
    )
    dense = randomise(transformers.ModernBertForMaskedLM(config))
    made = layout.build(_data(dense, ((0, 2), (1,))))
    tensors = dense.state_dict()
    for name, value in list(made.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        own = tensors[name] if value.numel() else torch.empty(0)
        setattr(made.get_submodule(owner), leaf, torch.nn.Parameter(own.clone()))
    made.tie_weights()
    made.save_pretrained(tmp_path)
    adapter = adapter_for(config)
    for kind, layers in (("heads", (0, 2)), ("ffn", (1,))):
        for layer in layers:
            adapter.sites_of(dense, layer, (kind,))[0].consumer.weight.data.zero_()
    tokens = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, 15:] = 0
    with torch.no_grad():
        now = liar_ext.load(tmp_path)(tokens, attention_mask=mask).logits
        wanted = dense(tokens, attention_mask=mask).logits
    assert float((now - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    with pytest.raises(RuntimeError, match="ize"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)

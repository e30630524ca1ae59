"""The trace of a family is what its adapter declares, and what no adapter declares is proved."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from liar_families import FAMILIES, UNLISTED, WITHOUT_HEADS, outputs
from torch import nn
from transformers.pytorch_utils import Conv1D

from liar_ext.errors import UnsupportedModelError
from liar_ext.models import adapter_for, linear, text_config
from liar_ext.models.traced import NO_LIMIT, TracedFamily
from liar_ext.ops.logits import PLAIN
from liar_ext.tracing import trace
from liar_ext.tracing.dependence import graph
from liar_ext.tracing.probe import LayerProbe
from liar_ext.tracing.signature import signature
from liar_ext.tracing.stand_ins import Cut, skeleton, surrogates

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


# a layer of T5's encoder does not run alone: it is given what the first one hands on
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "t5-encoder"])
def test_the_trace_is_what_the_adapter_declares(name):
    model = FAMILIES[name].build()
    adapter, config = adapter_for(model.config), text_config(model.config)
    found = trace(model.config)
    own = found.family.adapter()
    assert [spec.kind for spec in own.sites] == [spec.kind for spec in adapter.sites]
    assert len(found.family.refused) == len(adapter.refused)
    assert (own.layers, own.decoder) == (adapter.layers, adapter.decoder)
    if "heads" in FAMILIES[name].kinds:
        assert own.head_dim(config) == adapter.head_dim(config)
    assert own.max_positions(config) == adapter.max_positions(config)
    # what is multiplied before it is added is no sum to a trace
    assert own.residual(config) == (adapter.residual(config) and adapter.scale == 1)
    plain = adapter.decoder and adapter.logits == PLAIN
    assert (own.returns, own.plain_head) == (adapter.returns, plain)
    assert own.options == adapter.options or not adapter.decoder
    kinds = tuple(spec.kind for spec in adapter.sites)
    for index in range(2):
        pairs = zip(
            own.sites_of(model, index, kinds), adapter.sites_of(model, index, kinds), strict=True
        )
        for mine, theirs in pairs:
            assert mine.spec.consumer == theirs.spec.consumer
            assert set(mine.spec.producers) == set(theirs.spec.producers)
            assert (mine.units, mine.columns) == (theirs.units, theirs.columns)
            assert mine.columns_per_unit == theirs.columns_per_unit
            assert mine.unit_parameters == theirs.unit_parameters
            # whatever it states of itself in a config, the family's config states as well
            if mine.spec.config_fields is not None:
                assert mine.config_values() == theirs.config_values()
            else:
                assert theirs.spec.config_fields is None
    assert all(site.adapter_agrees for site in found.sites)


@pytest.mark.parametrize("name", UNLISTED)
def test_units_zeroed_or_removed_give_the_same_outputs(name):
    """With real weights, in float64, by indexing written out here."""
    model = UNLISTED[name].build().double()
    family = trace(model.config).family
    adapter = family.adapter()
    assert [s.kind for s in family.sites].count("heads") == (name not in WITHOUT_HEADS)
    for spec in family.sites:
        zeroed, smaller = copy.deepcopy(model), copy.deepcopy(model)
        dense = outputs(model).double()
        for index in range(2):
            site = adapter.sites_of(zeroed, index, (spec.kind,))[0]
            units = site.units
            keep = torch.arange(units)[(1 - index) :: 2]
            weight = linear.weight(site.consumer).unflatten(1, (units, -1))
            gone = [u for u in range(units) if u not in keep.tolist()]
            weight[:, gone] = 0
            adapter.sites_of(smaller, index, (spec.kind,))[0].shrink(keep)
        expected, got = outputs(zeroed).double(), outputs(smaller).double()
        assert float((expected - dense).abs().max()) > 1e-3 * float(dense.abs().max())
        # outputs are compared in float32
        assert float((got - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def _declared(config) -> dict[str, list[tuple[str, int, int, int]]]:
    return {
        spec.kind: [(p.path, p.segment, p.segments, p.length) for p in spec.producers]
        for spec in trace(config).family.sites
    }


@pytest.mark.parametrize(
    ("config", "kind", "expected"),
    [
        # q, k, v head by head: one run
        (transformers.GPTNeoXConfig(**SMALL), "heads", [("attention.query_key_value", 0, 1, 1)]),
        (
            transformers.GlmConfig(**SMALL, num_key_value_heads=4, head_dim=8, pad_token_id=1),
            "ffn",
            [("mlp.gate_up_proj", 0, 2, 1), ("mlp.gate_up_proj", 1, 2, 1)],
        ),
        (
            transformers.ModernBertConfig(**SMALL, pad_token_id=1),
            "heads",
            [("attn.Wqkv", i, 3, 1) for i in range(3)],
        ),
    ],
    ids=["interleaved", "gate-up", "qkv"],
)
def test_fused_projections_are_told_apart(config, kind, expected):
    assert _declared(config)[kind] == expected


class _FusedGroups(nn.Module):
    """Grouped-query attention with q, k and v behind each other in one projection: 6 runs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 8 * 3 + 2 * 4 * 3, device="meta")
        self.out = nn.Linear(24, 12, device="meta")

    def forward(self, hidden_states):
        q, k, v = self.qkv(hidden_states).split((24, 12, 12), -1)
        q, k, v = (x.unflatten(-1, (-1, 3)).transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        mixed = torch.softmax(q @ k.mT, -1) @ v
        return hidden_states + self.out(mixed.transpose(1, 2).flatten(2))


class _Chain(nn.Module):
    """Two linears in a row whose middle also reaches the output, or a norm, as asked for."""

    def __init__(self, trouble: str) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6, device="meta")
        self.down = nn.Linear(6, 4, device="meta")
        self.other = nn.Linear(6, 4, device="meta")
        self.trouble = trouble

    def forward(self, hidden_states):
        x = self.up(hidden_states)
        if self.trouble == "norm":
            x = x / x.norm(dim=-1, keepdim=True)
        if self.trouble == "rolled":
            x = x.roll(1, -1)
        if self.trouble == "flipped tokens":
            x = x.flip(1)
        if self.trouble == "twice":
            x = x + self.up(hidden_states)
        y = self.down(x)
        return y + self.other(x) if self.trouble == "shared" else y + self.other(x * 0 + 1)


def _probe(layer: nn.Module, width: int) -> LayerProbe:
    from liar_ext.engine.calls import LayerCall

    return LayerProbe(layer, lambda count: (torch.zeros(count, 6, width), LayerCall((), {})))


def test_runs_of_unequal_length_in_one_projection():
    from liar_ext.tracing.dependence import units

    probe = _probe(_FusedGroups(), 12)
    found = units(probe, graph(probe), "out")
    assert [(p.segment, p.segments, p.length) for p in found.spec.producers] == [
        (0, 4, 2),
        (2, 4, 1),
        (3, 4, 1),
    ]
    assert (found.columns.shape, found.head_dim) == ((4, 6), 3)
    assert found.rows["qkv"][1].tolist() == [*range(6, 12), *range(27, 30), *range(39, 42)]


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("norm", "all its columns are one unit"),
        ("rolled", "not equal runs, one after the other"),
        ("flipped tokens", "tokens in another order"),
        ("twice", "called more than once"),
        ("shared", "also reaches other"),
    ],
)
def test_what_is_no_site_is_refused_by_name(trouble, says):
    from liar_ext.tracing.dependence import NoSite, units

    probe = _probe(_Chain(trouble), 4)
    with pytest.raises(NoSite, match=says):
        units(probe, graph(probe), "down")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (transformers.MixtralConfig(**SMALL), "mixture of experts"),
        (transformers.BartConfig(vocab_size=97, d_model=32), "encoder-decoder"),
        (transformers.AlbertConfig(**SMALL, embedding_size=16), "do not simply follow each other"),
        (
            transformers.XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=48),
            "cannot be traced: its layers, one after the other: RuntimeError: ",
        ),
        (
            transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1),
            "cannot be traced: its first layer, run alone: RuntimeError: ",
        ),
        (
            transformers.NemotronConfig(**SMALL),
            "cannot be traced: made from its config: TypeError: ",
        ),
        (
            transformers.ElectraConfig(**SMALL, is_decoder=True, add_cross_attention=True),
            "is not called in a forward",
        ),
        (transformers.LlamaConfig(**SMALL, quantization_config={"bits": 4}), "quantised"),
        (
            transformers.LlamaConfig(
                **SMALL, num_experts=0, per_layer_config={1: {"num_experts": 4}}
            ),
            "its layers have a num_experts of their own",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_models_that_cannot_be_traced_are_refused_by_name(config, says):
    with pytest.raises(UnsupportedModelError, match=says) as caught:
        trace(config)
    assert repr(config.model_type) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "consumer", "says"),
    [
        (transformers.Olmo2Config(**SMALL), "self_attn.o_proj", "q_norm normalises over all"),
        (
            transformers.CohereConfig(**SMALL, use_qk_norm=True),
            "self_attn.o_proj",
            "cannot be removed",
        ),
        (
            transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
            "self_attention.dense",
            "cannot be removed",
        ),
        (
            transformers.FalconConfig(
                vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
            ),
            "self_attention.dense",
            "common rows",
        ),
        (
            transformers.CodeGenConfig(
                vocab_size=97, n_embd=32, n_layer=2, n_head=8, rotary_dim=4, n_positions=64
            ),
            "attn.out_proj",
            "not equal runs",
        ),
        (
            transformers.DebertaV2Config(
                **SMALL,
                relative_attention=True,
                position_buckets=4,
                share_att_key=True,
                pos_att_type=["p2c", "c2p"],
            ),
            "attention.output.dense",
            "is called more than once",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", "") or value.split(".")[0],
)
def test_heads_that_cannot_go_alone_are_refused_and_the_ffn_is_found(config, consumer, says):
    family = trace(config).family
    assert says in family.refused[consumer]
    assert family.refused[consumer].startswith(f"{consumer}: ")
    assert [spec.kind for spec in family.sites] == ["ffn"]


def test_a_trace_is_json_and_back():
    import json

    family = trace(UNLISTED["falcon"].build().config).family
    assert TracedFamily.from_json(json.loads(json.dumps(family.to_json()))) == family


def test_nothing_is_read_but_the_config_and_nothing_of_it_is_changed():
    config = UNLISTED["glm"].build().config
    before = config.to_dict()
    trace(config)
    assert config.to_dict() == before


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize(("rows", "columns"), [(7, 3), (3, 7), (5, 5)])
def test_a_cut_surrogate_is_the_whole_one_without_its_rows_and_columns(kind, rows, columns):
    module = nn.Linear(columns, rows) if kind is nn.Linear else Conv1D(rows, columns)
    x = torch.randn(2, 4, columns, dtype=torch.float64)
    whole = surrogates({"l": module})
    assert whole("l", x).shape == (2, 4, rows)
    keep_rows, keep = torch.tensor([0, 2]), torch.tensor([1, 2])
    shape = (rows, columns)
    cut = surrogates({"l": module}, {"l": Cut(shape, rows=keep_rows)})
    assert torch.equal(cut("l", x), whole("l", x)[..., keep_rows])
    gone = x.clone()
    gone[..., [c for c in range(columns) if c not in (1, 2)]] = 0
    for masked in (True, False):
        cut = surrogates({"l": module}, {"l": Cut(shape, columns=keep, masked=masked)})
        got = cut("l", x if masked else x[..., keep])
        torch.testing.assert_close(got, whole("l", gone), rtol=1e-12, atol=1e-12)


def test_a_skeleton_holds_no_weight_of_a_linear():
    found = skeleton(transformers.LlamaConfig(num_hidden_layers=2))
    weights = [linear.weight(module) for module in found.linears.values()]
    assert {weight.device.type for weight in weights} == {"meta"}
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in found.model.state_dict().values()
        if t.device.type == "cpu"
    }
    assert sum(held.values()) < 2**20


@pytest.mark.parametrize(
    "config",
    [
        transformers.GemmaConfig(
            **SMALL, num_key_value_heads=2, head_dim=8, use_bidirectional_attention=True
        ),
        transformers.Gemma3TextConfig(
            **SMALL, num_key_value_heads=2, head_dim=8, use_bidirectional_attention=True
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_an_encoder_of_a_decoders_class_keeps_no_cache(config):
    found = trace(config)
    assert not found.family.decoder
    assert [spec.kind for spec in found.family.sites] == ["heads", "ffn"]
    assert found.family.adapter().options == {"use_cache": False}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            transformers.MptConfig(
                vocab_size=97, d_model=32, n_heads=4, n_layers=1, max_seq_len=16
            ),
            16,
        ),
        (transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4), NO_LIMIT),
    ],
    ids=["max_seq_len", "no limit"],
)
def test_the_longest_input_is_what_the_config_states_under_any_name(config, expected):
    assert trace(config).family.max_positions == expected


def test_a_package_that_a_models_code_needs_is_named(monkeypatch):
    def needs(self, config):
        raise ImportError("SplinterModel requires the detectron2 library")

    monkeypatch.setattr(transformers.SplinterModel, "__init__", needs)
    with pytest.raises(UnsupportedModelError, match="'splinter' cannot be traced: .* detectron2"):
        trace(transformers.SplinterConfig(**SMALL))


class _Layer(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6, device="meta")
        self.register_buffer("slopes", settings.pop("slopes", torch.ones(2)))
        for name, value in settings.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("setting", "same"),
    [
        ({}, True),
        ({"layer_idx": 1}, True),
        ({"block_index": 1}, True),
        ({"layer_idx": 5}, False),
        ({"layer_is_sparse": True}, False),
        ({"kernel": [1, 2]}, False),
        ({"shape": (1, (2, 3))}, False),
        ({"slopes": torch.full((2,), 2.0)}, False),
        ({"slopes": torch.ones(2, dtype=torch.float64)}, False),
        ({"activation": nn.GELU()}, False),
    ],
    ids=str,
)
def test_layers_share_a_trace_if_they_differ_in_their_number_alone(setting, same):
    plain = {"layer_idx": 0, "block_index": 0, "layer_is_sparse": False, "kernel": [1], "shape": ()}
    layers = [_Layer(**plain), _Layer(**{**plain, "layer_idx": 1, "block_index": 1, **setting})]
    assert (signature(layers[0], 0) == signature(layers[1], 1)) == same


class _ManyNumbers(nn.Module):
    """Twelve integers as large as its width, and a table of that width that nothing shrinks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, device="meta"), nn.Linear(6, 4, device="meta")
        self.scale = torch.arange(1.0, 7.0, dtype=torch.float64)
        for number in range(12):
            setattr(self, f"width_{number}", 6)

    def forward(self, hidden_states):
        return hidden_states + self.down(self.up(hidden_states) * self.scale)


def test_the_search_for_integers_that_follow_a_width_ends_and_says_so():
    from liar_ext.tracing.dependence import NoSite, units
    from liar_ext.tracing.removal import with_attributes

    probe = _probe(_ManyNumbers(), 4)
    found = units(probe, graph(probe), "down")
    with pytest.raises(NoSite, match=r"cannot be removed.* \(12 integers .* 128 choices of them"):
        with_attributes([probe], found)

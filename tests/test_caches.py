"""Keys and values go by the name that the installed transformers knows them by."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from liar_families import FAMILIES

from liar_ext.bench.serve_lanes import Decoding
from liar_ext.caches import cache_of, cache_option
from liar_ext.export.onnx_graph import cache_shapes, cached_graph


class _Before:
    def forward(self, input_ids, past_key_values=None): ...


class _Now:
    def forward(self, input_ids, cache=None, **kwargs): ...


def test_the_option_is_the_one_that_the_model_takes():
    assert cache_option(_Before()) == "past_key_values"
    assert cache_option(_Now()) == "cache"


def test_an_output_has_them_by_either_name_or_not_at_all():
    assert cache_of(SimpleNamespace(past_key_values="kept")) == "kept"
    assert cache_of(SimpleNamespace(cache="kept")) == "kept"
    assert cache_of(SimpleNamespace(logits=0)) is None


@pytest.mark.parametrize("name", ["llama-gqa-biases", "qwen2", "gpt2", "opt"])
def test_no_deprecated_name_is_used(name):
    model = FAMILIES[name].build().eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", FutureWarning)
        Decoding(model, torch.zeros(1, 3, dtype=torch.int64), 3, "eager").tokens(3)
        cache_shapes(model)
        graph = cached_graph(model)
        graph.module(*graph.inputs)

"""The clock of the benchmarks."""

from __future__ import annotations

import os

import pytest
import torch

from liar_ext.bench import measure
from liar_ext.errors import InputError

CPU = torch.device("cpu")


def test_every_round_samples_each_variant_once(monkeypatch):
    order = []
    monkeypatch.setattr(
        measure, "_sample", lambda call, calls, device: order.append((call(), calls)) or 0.5
    )
    seconds = measure.interleave({"a": lambda: "a", "b": lambda: "b"}, 2, CPU)
    # a call of half a second is long: one untimed call each, then rounds
    assert order == [("a", 1), ("b", 1), ("a", 1), ("b", 1), ("a", 1), ("b", 1)]
    assert seconds == {"a": [0.5, 0.5], "b": [0.5, 0.5]}


def test_short_calls_share_a_sample():
    calls = []
    measure.interleave({"short": lambda: calls.append(0)}, 3, CPU)
    assert len(calls) == 2 + 3 * measure.MOST_CALLS


def test_medians_keep_four_digits():
    assert measure.spread([1e-5, 1.23456e-5, 2e-5])["ms"] == 0.01235


def test_rounds_are_compared_with_themselves():
    # the machine was twice as slow in the second round
    assert measure.times_as_fast([1.0, 2.0, 1.0], [3.0, 6.0, 3.0]) == 3.0


def test_rates_are_positive_and_a_cpu_tracks_no_memory():
    assert measure.matmul_rate(torch.float32, CPU, repeats=1, side=32) > 0
    assert measure.copy_rate(CPU, repeats=1, size=4096) > 0
    assert measure.peak_bytes(lambda: torch.ones(10), CPU) is None


def test_a_variable_is_put_back_even_after_an_error(monkeypatch):
    monkeypatch.setenv("LIAR_BACKEND", "torch")

    def fails():
        with measure.variable("LIAR_BACKEND", None):
            raise RuntimeError(os.environ.get("LIAR_BACKEND", "unset"))

    with pytest.raises(RuntimeError, match="unset"):
        fails()
    assert os.environ["LIAR_BACKEND"] == "torch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="no CUDA device"):
        measure.resolve_device("cuda")
    assert measure.resolve_device("auto") == CPU


@pytest.mark.gpu
def test_a_gpu_is_timed_by_events_and_its_memory_tracked():
    device = torch.device("cuda")
    x = torch.randn(1024, 1024, device=device)
    seconds = measure.interleave({"mm": lambda: x @ x}, 3, device)["mm"]
    assert 0 < min(seconds) < 1
    assert measure.peak_bytes(lambda: x + 1, device) >= x.numel() * 4


@pytest.mark.parametrize("name", ["LIAR_BACKEND", "LIAR_GRAM_KERNEL"])
def test_a_forced_backend_would_be_every_variant(monkeypatch, name):
    monkeypatch.setenv(name, "torch")
    with pytest.raises(InputError, match=f"{name}=torch: this benchmark runs every version"):
        measure.refuse_forcing()


def test_a_model_is_called_by_its_folder_wherever_one_stands(tmp_path, monkeypatch):
    folder = tmp_path / "models" / "llama"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for source in (".", "../llama", "../llama/", str(folder)):
        assert measure.source_name(source) == "llama"
    assert measure.source_name("..") == "models"
    assert measure.source_name("meta-llama/Llama-3.1-8B") == "Llama-3.1-8B"

"""`liar bench gram`: what a row holds, and that a wrong variant has no speed and costs no other."""

from __future__ import annotations

import argparse
import json
import os
import sys

import liar_cuda_host
import liar_gram_host
import pytest
import torch

from liar_ext.bench import BENCHMARKS, gram, gram_checks, gram_variants, measure
from liar_ext.bench.gram_checks import Case
from liar_ext.cli import main
from liar_ext.errors import InputError
from liar_ext.ops import _native_gram, backends, gram_reference

SMALL = ["--sizes", "40", "--tokens", "64", "--dtypes", "float32", "--repeats", "2"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """Seconds of products and copies say nothing here."""
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setitem(measure.CEILING_SIDE, "cpu", 16)
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 1024)


@pytest.fixture
def broken(monkeypatch):
    """A torch backend that forgets to accumulate."""
    wrong = backends.Implementation("gram", "torch", lambda *_: None, backends.anywhere)
    monkeypatch.setitem(backends._REGISTRY["gram"], "torch", wrong)


def execute(*words: str) -> dict:
    parser = argparse.ArgumentParser()
    BENCHMARKS["gram"].add_arguments(parser)
    return BENCHMARKS["gram"].execute(parser.parse_args([*SMALL, "--device", "cpu", *words]))


def by_name(rows):
    return {(row["variant"], row["case"]): row for row in rows}


@pytest.fixture
def chosen(monkeypatch):
    """torch is what runs by itself, whether the C++ extension is built or not."""
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("torch",))


def test_each_variant_has_a_row_beside_the_baseline(chosen, capsys):
    result = execute("--backends", "torch", "reference", "--keep", "0.5")
    rows = by_name(result["rows"])
    assert list(rows) == [
        (gram_variants.BASELINE, "triangle"),
        ("torch", "triangle"),
        ("torch", "mask"),
        ("torch", "keep 0.5 prefix"),
        ("torch", "keep 0.5 scattered"),
        ("reference", "triangle"),
    ]
    baseline = rows[gram_variants.BASELINE, "triangle"]
    assert baseline["ratio"] == 1.0
    assert not baseline["ours"]
    for (_, case), row in rows.items():
        assert row["ok"]
        assert row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        useful = Case(*_arguments(case)).flops(64, 40)
        assert row["gflops"] == pytest.approx(useful / row["ms"] / 1e6, rel=1e-3)
        ceiling = result["ceilings"]["matmul_gflops"]["float32"]
        assert row["share"] == pytest.approx(row["gflops"] / ceiling, rel=1e-2, abs=1e-4)
    ours = rows["torch", "triangle"]
    assert ours["error"] <= ours["bound"]
    assert abs(ours["bias"]) < 1e-6
    assert ours["chosen"]
    assert ours["peak_bytes"] is None
    assert "overhead" in rows["torch", "mask"]
    assert "extraction" in rows["torch", "keep 0.5 prefix"]
    assert result["device"] == "cpu"
    assert result["problems"] == []
    json.dumps(result, allow_nan=False)
    printed = capsys.readouterr().out
    assert "keep 0.5 scattered" in printed
    assert "unmeasured GPU Gram, bfloat16, n = 4096" in printed


def _arguments(case):
    kind, *rest = case.split()
    return (kind, float(rest[0]), rest[1]) if rest else (kind,)


def test_the_kernels_of_triton_are_variants_of_their_own():
    pytest.importorskip("triton")
    if reason := backends.obstacle("gram", "triton", CPU, torch.float32):
        pytest.skip(f"no interpreted kernels: {reason}")
    result = execute("--backends", "triton", "--sizes", "17", "--repeats", "1", "--keep", "0.5")
    rows = by_name(result["rows"])
    names = ["triton", "triton:pointer", "triton:descriptor"]
    cases = ["triangle", "mask", "product", "keep 0.5 prefix", "keep 0.5 scattered"]
    assert list(rows)[1:] == [(name, case) for name in names for case in cases]
    assert result["problems"] == []
    assert all(row["error"] <= row["bound"] for row in list(rows.values())[1:])


def test_a_backend_that_failed_its_self_test_is_a_problem(monkeypatch):
    def unavailable(device, dtype):
        return "its self-test is wrong: relative error 1e-01, bound 1e-06"

    broken = backends.Implementation("gram", "triton", lambda *_: None, unavailable)
    monkeypatch.setitem(backends._REGISTRY["gram"], "triton", broken)
    problems = execute("--keep")["problems"]
    assert problems == [
        "triton for float32: its self-test is wrong: relative error 1e-01, bound 1e-06"
    ]


def test_a_wrong_variant_has_no_speed_and_costs_the_others_none(broken, tmp_path, capsys):
    file = tmp_path / "result.json"
    command = ["bench", "gram", *SMALL, "--backends", "reference", "torch", "--keep"]
    assert main([*command, "--json", str(file)]) == 1
    output = capsys.readouterr()
    assert "WRONG" in output.out
    assert output.err.startswith("error: torch triangle float32 n=40 is wrong")
    rows = by_name(json.loads(file.read_text())["rows"])
    assert "ms" in rows["reference", "triangle"]
    wrong = rows["torch", "triangle"]
    assert not wrong["ok"]
    assert wrong["error"] > wrong["bound"]
    assert not {"ms", "gflops", "ratio", "share"} & set(wrong)


def test_a_variant_that_raises_is_named_and_the_others_are_measured(monkeypatch, chosen):
    def fails(*_):
        raise RuntimeError("CUtensorMap must be aligned")

    broken = backends.Implementation("gram", "torch", fails, backends.anywhere)
    monkeypatch.setitem(backends._REGISTRY["gram"], "torch", broken)
    result = execute("--backends", "torch", "reference", "--keep")
    assert result["problems"][0] == (
        "torch triangle float32 n=40 failed: RuntimeError: CUtensorMap must be aligned"
    )
    assert "ms" in by_name(result["rows"])["reference", "triangle"]


def test_a_shape_that_does_not_fit_costs_the_others_nothing(monkeypatch):
    right = gram.interleave

    def limited(calls, repeats, device):
        if repeats == 2 and next(iter(calls.values()))().shape == (40, 40):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(calls, repeats, device)

    monkeypatch.setattr(gram, "interleave", limited)
    result = execute("--sizes", "40", "9", "--backends", "torch", "--keep")
    assert result["problems"] == ["float32 n=40 failed: CUDA out of memory"]
    assert {row["n"] for row in result["rows"]} == {9}


def test_nan_is_wrong_and_can_be_written(monkeypatch):
    def poison(x, mask, order, out, sum, count):
        out.fill_(torch.nan)

    wrong = backends.Implementation("gram", "torch", poison, backends.anywhere)
    monkeypatch.setitem(backends._REGISTRY["gram"], "torch", wrong)
    result = execute("--backends", "torch", "--keep")
    assert not by_name(result["rows"])["torch", "triangle"]["ok"]
    json.dumps(result, allow_nan=False)


def test_a_backend_that_cannot_run_is_named_with_the_reason():
    with pytest.raises(InputError, match=r"--backends cuda cannot run gram on cpu"):
        execute("--backends", "cuda")


def test_what_is_absent_is_in_the_result_with_the_reason():
    absent = execute("--keep")["absent"]["float32"]
    assert "cuda" in absent
    assert "triton" in absent


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sizes", "0"], "must be positive"),
        (["--tokens", "-1"], "must be positive"),
        (["--keep", "1.5"], "between 0 and 1"),
        (["--dtypes", "float8"], "--dtypes float8: give one of"),
        (["--dtypes", "float32:12,x"], "with sizes after a colon"),
        (["--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_bad_values_are_refused(words, says):
    if words == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(InputError, match=says):
        execute(*words)


def test_a_dtype_can_have_sizes_of_its_own():
    result = execute("--dtypes", "bfloat16", "float32:9,17", "--keep", "--backends", "torch")
    shapes = {(row["dtype"], row["n"]) for row in result["rows"]}
    assert shapes == {("bfloat16", 40), ("float32", 9), ("float32", 17)}


def test_work_and_tiles_of_an_extraction():
    half = Case("keep", 0.5)
    # the triangle of the kept columns and the panel below it: f(2 - f) of the whole
    assert half.flops(10, 1000) == 0.75 * Case().flops(10, 1000)
    assert half.tile_share(128 * 200) == pytest.approx(0.75, abs=0.002)
    assert Case().tile_share(1000) == 1.0


@pytest.mark.parametrize("order", ["prefix", "scattered"])
def test_errors_are_seen_in_the_order_of_the_columns(order, chosen):
    x = torch.randn(50, 37)
    made = gram_variants.Variant("torch").accumulate(x, None, Case("keep", 0.3, order).moments(x))
    assert made.gram.shape == (37, 11)
    assert (made.order is None) == (order == "prefix")
    assert gram_checks.moments_error(x, None, made) < 1e-6
    made.gram[30, 5] *= 1.01
    assert gram_checks.moments_error(x, None, made) > 1e-5


def test_a_truncated_diagonal_has_a_bias_with_its_sign():
    x = torch.randn(300, 20)
    assert abs(gram_checks.diagonal_bias(x, lambda y: gram_reference(y).gram)) < 1e-12
    low = gram_checks.diagonal_bias(x, lambda y: gram_reference(y).gram * (1 - 1e-5))
    assert low == pytest.approx(-1e-5, rel=1e-3)


def test_forcing_a_variant_leaves_no_trace(monkeypatch):
    monkeypatch.setenv("LIAR_BACKEND", "reference")
    monkeypatch.delenv("LIAR_GRAM_KERNEL", raising=False)
    with gram_variants.Variant("triton", "pointer").forced():
        assert backends.forced("gram") == "triton"
        assert os.environ["LIAR_GRAM_KERNEL"] == "pointer"
    assert backends.forced("gram") == "reference"
    assert "LIAR_GRAM_KERNEL" not in os.environ


HOPPER = ["cuda:128x1", "cuda:128x1:12", "cuda:256x1", "cuda:256x1:12"]
HOPPER += ["cuda:256x2", "cuda:256x2:12"]


@pytest.fixture(params=["emulated", "pretended"])
def hopper(request, monkeypatch):
    """The Hopper kernel on CPU tensors: the real one in the emulator, or its definition."""
    if request.param == "emulated":
        if reason := liar_cuda_host.unavailable():
            pytest.skip(reason)
        liar_gram_host.install(monkeypatch)
    else:
        monkeypatch.setattr(_native_gram, "unavailable", lambda *_: None)
    asked = []
    real = _native_gram.gram_sm90 if request.param == "emulated" else _definition

    def remembered(x, gram, sum, **options):
        asked.append(tuple(options[name] for name in ("tile", "cluster", "period")))
        real(x, gram, sum, **options)

    monkeypatch.setattr(_native_gram, "gram_sm90", remembered)
    return asked


def _definition(x, gram, sum, **_):
    gram += x.float().T @ x.float()
    sum += x.double().sum(0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_settings_of_the_hopper_kernel_are_measured_on_the_plain_triangle(hopper, dtype):
    variants = gram_variants.settings(CPU, gram.DTYPES[dtype])
    assert [variant.name for variant in variants] == HOPPER
    rows = gram.run(40, 64, dtype, variants, 2, CPU, keep=[0.5])
    assert [(row["variant"], row["case"]) for row in rows[1:]] == [(n, "triangle") for n in HOPPER]
    for row in rows[1:]:
        assert row["ok"]
        assert not row["chosen"]
        assert row["error"] <= row["bound"]
        assert row["ratio"] > 0
        assert {"ms", "gflops", "bias"} <= set(row)
    every = {
        (tile, cluster, p) for tile, cluster in ((128, 1), (256, 1), (256, 2)) for p in (0, 12)
    }
    assert {tuple(row["setting"].values()) for row in rows[1:]} == every
    assert set(hopper) == every
    json.dumps(rows, allow_nan=False)


def test_a_wrong_setting_has_no_speed(monkeypatch):
    monkeypatch.setattr(_native_gram, "unavailable", lambda *_: None)

    def forgets(x, gram, sum, *, cluster, **_):
        _definition(x, gram, sum)
        if cluster == 2:
            gram.zero_()

    monkeypatch.setattr(_native_gram, "gram_sm90", forgets)
    variants = gram_variants.settings(CPU, torch.bfloat16)
    rows = gram.run(40, 64, "bfloat16", variants, 2, CPU)
    assert [row["variant"] for row in rows if not row["ok"]] == HOPPER[4:]
    assert [row["variant"] for row in rows[1:] if "ms" in row] == HOPPER[:4]


def test_settings_are_left_out_where_rows_would_have_to_be_copied(hopper):
    variants = gram_variants.settings(CPU, torch.bfloat16)
    assert len(gram.run(41, 64, "bfloat16", variants, 2, CPU)) == 1
    assert hopper == []


@pytest.mark.parametrize(
    ("names", "dtype", "expected"),
    [
        (None, torch.bfloat16, HOPPER),
        (["cuda"], torch.float16, HOPPER),
        (["torch"], torch.bfloat16, []),
        (None, torch.float32, []),
    ],
)
def test_settings_go_with_the_cuda_backend_and_16_bit_values(monkeypatch, names, dtype, expected):
    monkeypatch.setattr(backends, "obstacle", lambda *_: None)
    monkeypatch.setattr(_native_gram, "unavailable", lambda *_: None)
    found, _ = gram_variants.usable(names, CPU, dtype)
    assert [variant.name for variant in found if variant.setting is not None] == expected
    assert len({variant.name for variant in found}) == len(found)


def test_without_the_hopper_kernel_there_are_no_settings():
    assert _native_gram.unavailable(CPU, torch.bfloat16) is not None
    assert gram_variants.settings(CPU, torch.bfloat16) == []


@pytest.mark.parametrize(
    ("device", "dtype", "says"),
    [
        ("cpu", torch.bfloat16, "need a GPU"),
        ("cuda", torch.float32, "16-bit"),
        ("cuda", torch.bfloat16, "not installed"),
    ],
)
def test_quack_says_why_it_cannot_be_called(device, dtype, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "quack", None)
    assert says in gram_variants.quack(torch.device(device), dtype)


def test_quack_is_called_with_a_float32_result(monkeypatch):
    """Its interface as of 0.6: `gemm_symmetric(A (M, K), B (K, M), out_dtype=...)`."""
    calls = []

    class Interface:
        @staticmethod
        def gemm_symmetric(a, b, *, out_dtype):
            calls.append((a.shape, b.shape, out_dtype))
            return (a.double() @ b.double()).to(out_dtype)

    monkeypatch.setitem(sys.modules, "quack", Interface)
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", Interface)
    product = gram_variants.quack(torch.device("cuda"), torch.bfloat16)
    x = torch.randn(30, 8, dtype=torch.bfloat16)
    assert gram_checks.gram_error(x, product(x)) < 1e-6
    assert calls == [((8, 30), (30, 8), torch.float32)]

"""The Hopper Gram kernel against float64: emulated on CPU tensors, and on a GPU where there is one.

Most cases hold small integers, whose sums are exact in float32 however they are added up, so that
the comparison is for equality and one wrong index shows.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import liar_cuda_host
import liar_gram_host
import pytest
import torch
from liar_testing import assert_close_rms

from liar_ext.errors import BackendError
from liar_ext.ops import _native_gram

ROOT = liar_cuda_host.ROOT
NO_EMULATOR = liar_cuda_host.unavailable()
emulator = pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))

# relative error of a sum of positive terms: 24 steps of 16 tokens, each truncated by half a unit in
# the last place (2⁻²⁴) of a sum that is on average half of what it becomes, is 7e-7
BIAS = 1e-6

# which blocks work together on which tile
TEAMS = {"128": {"tile": 128}, "256": {"tile": 256}, "256x2": {"tile": 256, "cluster": 2}}

SPLIT = ((0, 0), (0, 1), (1, 0), (0, 2), (2, 0), (1, 1))


@pytest.fixture(
    params=[pytest.param("emulated", marks=emulator), pytest.param("gpu", marks=pytest.mark.gpu)]
)
def device(request, monkeypatch):
    """The kernel runs on tensors of this device for the rest of the test."""
    if request.param == "emulated":
        liar_gram_host.install(monkeypatch)
        return torch.device("cpu")
    where = torch.device("cuda")
    if reason := _native_gram.unavailable(where, torch.bfloat16):
        pytest.skip(reason)
    return where


@pytest.fixture
def emulated(monkeypatch):
    if NO_EMULATOR:
        pytest.skip(NO_EMULATOR)
    return liar_gram_host.install(monkeypatch)


def padded_rows(values: torch.Tensor) -> torch.Tensor:
    """The same values in rows of a multiple of 8 elements, NaN in between: never to be read."""
    width = -(-values.shape[-1] // 8) * 8 + 8
    wide = values.new_full((*values.shape[:-1], width), torch.nan)
    wide[..., : values.shape[-1]] = values
    return wide[..., : values.shape[-1]]


def integers(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    values = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(1))
    # in this order: a copy to another device would drop the padding
    return padded_rows(values.to(device=device, dtype=dtype))


def reference(x: torch.Tensor, panel: int, planes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gram panel and column sums in float64: with planes, of the six products that are made."""
    values = x.double().cpu()
    if planes == 1:
        return values.T @ values[:, :panel], values.sum(0)
    gram = sum(values[a].T @ values[b][:, :panel] for a, b in SPLIT)
    return gram, values.sum((0, 1))


def outputs(columns: int, panel: int, device: torch.device, padding: int = 0):
    """Gram and sum with integers to accumulate into; NaN where nothing may be read or written."""
    generator = torch.Generator().manual_seed(2)
    wide = torch.full((columns, panel + padding), torch.nan)
    start = torch.randint(-9, 10, (columns, panel), generator=generator).float()
    wide[:, :panel] = start.masked_fill(upper(columns, panel), torch.nan)
    total = torch.randint(-9, 10, (columns,), generator=generator).double()
    return wide.to(device)[:, :panel], total.to(device)


def upper(columns: int, panel: int) -> torch.Tensor:
    return torch.ones(columns, panel, dtype=torch.bool).triu(1)


def check_exact(device, columns, tokens, panel, dtype=torch.bfloat16, planes=1, pad=0, **options):
    shape = (tokens, columns) if planes == 1 else (3, tokens, columns)
    x = integers(*shape, dtype=dtype, device=device)
    gram, total = outputs(columns, panel, device, pad)
    expected_gram, expected_sum = reference(x, panel, planes)
    expected_gram += gram.double().cpu()
    expected_sum += total.cpu()
    _native_gram.gram_sm90(x, gram, total, planes, **options)
    found = gram.double().cpu()
    hidden = upper(columns, panel)
    assert torch.isnan(found[hidden]).all(), "entries above the diagonal were written"
    assert torch.equal(found[~hidden], expected_gram[~hidden])
    assert torch.equal(total.cpu(), expected_sum)
    if pad:
        beside = torch.as_strided(gram, (columns, pad), (gram.stride(0), 1), panel)
        assert torch.isnan(beside).all(), "columns beside the panel were written"


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize(
    ("columns", "tokens", "panel"),
    [
        (1, 1, 1),
        (8, 1, 8),
        (8, 63, 3),
        (72, 64, 72),
        (129, 130, 129),
        (136, 65, 136),
        (200, 130, 100),
        (201, 700, 1),
        (264, 64, 200),
        (520, 130, 520),
        (520, 130, 300),
        (777, 70, 513),
    ],
)
def test_every_entry_is_exact(device, columns, tokens, panel, team):
    check_exact(device, columns, tokens, panel, **TEAMS[team])


@pytest.mark.parametrize("pad", [1, 2])
def test_a_padded_gram_of_odd_or_even_stride_is_written_inside_its_panel_only(device, pad):
    check_exact(device, 520, 64, 260, pad=pad)


@pytest.mark.parametrize("team", TEAMS)
def test_float16(device, team):
    check_exact(device, 264, 130, 264, dtype=torch.float16, **TEAMS[team])


@pytest.mark.parametrize("tile", [128, 256])
@pytest.mark.parametrize(
    ("columns", "tokens", "panel"), [(8, 1, 8), (136, 95, 136), (264, 97, 200)]
)
def test_three_planes_are_six_products(device, columns, tokens, panel, tile):
    check_exact(device, columns, tokens, panel, planes=3, tile=tile)


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("blocks", [1, 3])
def test_few_blocks_take_the_tiles_in_turn(device, blocks, team):
    check_exact(device, 520, 200, 520, blocks=blocks, **TEAMS[team])


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("team", TEAMS)
def test_what_is_left_for_a_last_turn_is_split_over_the_tokens(device, monkeypatch, planes, team):
    # four blocks and one tile, or two: each goes to two teams at least
    asked = []
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: asked.append(a[0]) or real(*a, **k))
    columns = 130 if team == "256" else 100
    check_exact(device, columns, 2100, columns, planes=planes, blocks=4, **TEAMS[team])
    slot = 128 * TEAMS[team]["tile"] * 4 + 128 * 8
    assert asked[0] >= 2 * slot and asked[0] % slot == 0


def test_a_column_that_is_not_finite_reaches_its_row_and_its_sum(device):
    x = integers(70, 200, dtype=torch.bfloat16, device=device)
    x[5, 150] = torch.inf
    gram, total = torch.zeros(200, 200, device=device), torch.zeros(200, device=device).double()
    _native_gram.gram_sm90(x, gram, total)
    finite = torch.isfinite(gram.cpu()).tril()
    row = torch.zeros(200, 200, dtype=torch.bool)
    row[150], row[:, 150] = True, True
    assert torch.equal(~finite.tril() & torch.ones(200, 200).bool().tril(), row.tril())
    assert torch.isinf(total[150]) and int((~torch.isfinite(total)).sum()) == 1


@pytest.mark.parametrize("planes", [1, 3])
def test_rounding_stays_within_the_bias(device, planes):
    x = torch.randn(700, 264, device=device)
    parts = split(x) if planes == 3 else x.bfloat16()
    value = x if planes == 3 else parts
    gram, total = torch.zeros(264, 264, device=device), torch.zeros(264, device=device).double()
    _native_gram.gram_sm90(parts, gram, total, planes)
    expected = value.double().T @ value.double()
    assert_close_rms(gram.tril(), expected.tril(), ratio=BIAS)
    # a stage is added up in float32 before it goes to float64
    assert_close_rms(total, value.double().sum(0), ratio=1e-6)


def split(x: torch.Tensor) -> torch.Tensor:
    high = x.bfloat16()
    middle = (x - high.float()).bfloat16()
    low = (x - high.float() - middle.float()).bfloat16()
    return torch.stack([high, middle, low])


def bias(
    device, tokens: int, columns: int, planes: int, period: int, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Relative errors of the sums of positive products."""
    x = torch.randn(tokens, columns, device=device).abs()
    parts = split(x) if planes == 3 else x.to(dtype)
    value = (x if planes == 3 else parts).double()
    gram = torch.zeros(columns, columns, device=device)
    _native_gram.gram_sm90(parts, gram, None, planes, period=period, tile=128)
    expected = value.T @ value
    lower = torch.ones_like(expected, dtype=torch.bool).tril()
    return ((gram.double() - expected) / expected)[lower].cpu()


@pytest.mark.parametrize("planes", [1, 3])
def test_moving_the_sum_keeps_the_bias_below_a_millionth_whatever_the_length(emulated, planes):
    """The emulator truncates as tensor cores are reported to; on a GPU the next test measures."""
    device = torch.device("cpu")
    short, long = (bias(device, tokens, 8, planes, period=0) for tokens in (1024, 16384 // planes))
    assert short.abs().max() <= BIAS
    assert long.abs().max() <= BIAS
    # four parts of a split tile, each a quarter as long
    without = bias(device, 16384 // planes, 8, planes, period=1 << 20)
    assert without.mean() < -5 * BIAS


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("planes", "dtype"), [(1, torch.bfloat16), (1, torch.float16), (3, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("tokens", [4096, 65536])
def test_the_bias_of_a_real_tensor_core_stays_below_a_millionth(tokens, planes, dtype):
    device = torch.device("cuda")
    if reason := _native_gram.unavailable(device, torch.bfloat16):
        pytest.skip(reason)
    found = bias(device, tokens, 512, planes, 0, dtype)
    assert found.mean().abs() <= BIAS
    # rounding of single entries comes on top
    assert found.abs().max() <= 2 * BIAS


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("team", TEAMS)
def test_the_result_does_not_depend_on_the_order_of_threads_or_copies(emulated, planes, team):
    x = torch.randn(300, 200).bfloat16() if planes == 1 else split(torch.randn(300, 200))
    found = []
    for order in liar_cuda_host.ORDERS:
        emulated.order(*order)
        gram, total = torch.zeros(200, 200), torch.zeros(200).double()
        _native_gram.gram_sm90(x, gram, total, planes, **TEAMS[team])
        found.append((gram, total))
    for gram, total in found[1:]:
        assert torch.equal(gram, found[0][0])
        assert torch.equal(total, found[0][1])


@pytest.mark.gpu
def test_current_stream_repeatability_and_graph_capture():
    device = torch.device("cuda")
    if reason := _native_gram.unavailable(device, torch.bfloat16):
        pytest.skip(reason)
    x = torch.randn(4096, 1032, device=device).bfloat16()
    expected = torch.zeros(1032, 1032, device=device)
    _native_gram.gram_sm90(x, expected, None)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gram = torch.zeros_like(expected)
            _native_gram.gram_sm90(x, gram, None)
            assert torch.equal(gram, expected)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.zeros_like(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _native_gram.gram_sm90(x, captured, None)
    captured.zero_()
    graph.replay()
    graph.replay()
    assert torch.equal(captured, 2 * expected)


@pytest.mark.gpu
def test_a_large_gram_against_cublas():
    device = torch.device("cuda")
    if reason := _native_gram.unavailable(device, torch.bfloat16):
        pytest.skip(reason)
    x = torch.randint(-3, 4, (8192, 4096), device=device).bfloat16()
    for panel in (4096, 2048, 1000):
        gram, total = torch.zeros(4096, panel, device=device), torch.zeros(4096, device=device)
        _native_gram.gram_sm90(x, gram, total := total.double())
        exact = torch.mm(x.float().T, x[:, :panel].float())
        assert torch.equal(gram.tril(), exact.tril())
        assert torch.equal(total, x.double().sum(0))


def test_another_device_is_refused(emulated):
    emulated.device(capability=80)
    with pytest.raises(RuntimeError, match="status 209"):
        _native_gram.gram_sm90(torch.ones(8, 8).bfloat16(), torch.zeros(8, 8), None)


def test_a_cpu_tensor_is_refused_by_name():
    with pytest.raises(BackendError, match="needs a CUDA tensor, not cpu"):
        _native_gram.gram_sm90(torch.ones(8, 8).bfloat16(), torch.zeros(8, 8), None)
    assert "float64" in str(_native_gram.unavailable(torch.device("cuda"), torch.float64))


def test_the_header_the_bindings_and_the_wrapper_agree_on_the_arguments():
    """Positions and types: nothing else checks the binding where it cannot be built."""
    header = (ROOT / "csrc" / "liar.h").read_text()
    body = header[: header.index("} LiarGramSm90;")].rpartition("typedef struct {")[2]
    kinds = {"int32_t ": ctypes.c_int32, "int64_t ": ctypes.c_int64}
    fields = [
        (name, kinds.get(kind, ctypes.c_void_p))
        for kind, name in re.findall(r"^  (\w[\w ]*?[ *]+)(\w+);", body, re.MULTILINE)
    ]
    assert fields == list(liar_gram_host.LiarGramSm90._fields_)
    bindings = (ROOT / "csrc" / "bindings.cpp").read_text()
    order = (*liar_gram_host.SHAPE, *liar_gram_host.POINTERS)
    for function, wanted in (("gram_sm90_workspace", liar_gram_host.SHAPE), ("gram_sm90", order)):
        text = re.search(rf"(?:void|int64_t) {function}\(([^)]*)\)", bindings).group(1)
        assert tuple(parameter.split()[-1] for parameter in text.split(",")) == tuple(wanted)


GRAM = torch.zeros(16, 16)


@pytest.mark.parametrize(
    ("x", "gram", "total", "planes", "message"),
    [
        (torch.ones(4, 16), GRAM, None, 1, "bfloat16 or torch.float16; got torch.float32"),
        (torch.ones(3, 4, 16).half(), GRAM, None, 3, "must be torch.bfloat16"),
        (torch.ones(4, 16).half(), GRAM, None, 2, "planes must be 1 or 3"),
        (torch.ones(2, 4, 16).bfloat16(), GRAM, None, 3, r"\(3, tokens, columns\)"),
        (torch.ones(4, 9).half(), torch.zeros(9, 9), None, 1, "copy it to padded rows"),
        (torch.ones(16, 4).half().T, GRAM, None, 1, "unit column stride"),
        (torch.ones(100).half()[1:65].view(4, 16), GRAM, None, 1, "16-byte aligned start"),
        (torch.ones(4, 16).half(), torch.zeros(16, 17), None, 1, r"\(16, s\) with s ≤ 16"),
        (torch.ones(4, 16).half(), GRAM.double(), None, 1, "must be float32"),
        (torch.ones(4, 16).half(), GRAM, torch.zeros(16), 1, "contiguous float64"),
        (torch.ones(4, 16).half(), torch.zeros(16, 32)[:, ::2], None, 1, "unit column stride"),
    ],
)
def test_arguments_that_the_kernel_cannot_take(emulated, x, gram, total, planes, message):
    with pytest.raises(ValueError, match=message):
        _native_gram.gram_sm90(x, gram, total, planes)


@pytest.mark.parametrize("planes", [1, 3])
def test_an_empty_panel_still_has_sums(device, planes):
    check_exact(device, 130, 70, 0, planes=planes)


def test_what_can_be_read_in_place():
    x = torch.ones(4, 24).half()
    assert _native_gram.readable(x)
    assert _native_gram.readable(x[:, 8:13])
    assert _native_gram.readable(torch.ones(1, 5).half())
    assert not _native_gram.readable(x[:, 1:9])
    assert not _native_gram.readable(torch.ones(4, 9).half())
    assert not _native_gram.readable(x.T)
    assert not _native_gram.readable(torch.ones(1, 24).half().expand(4, 24))
    assert _native_gram.readable(torch.ones(3, 1, 24).bfloat16(), planes=3)
    assert not _native_gram.readable(torch.ones(3, 4, 32).bfloat16()[:, :, ::2], planes=3)


def test_nothing_to_do_is_done(emulated):
    gram, total = outputs(16, 16, torch.device("cpu"))
    before = gram.clone()
    _native_gram.gram_sm90(torch.empty(0, 16).half(), gram, total)
    assert torch.equal(gram.nan_to_num(7), before.nan_to_num(7))


# one change to the kernel, and what the emulator makes of it: the reasons to trust the tests above
BROKEN = {
    "no wait for the last wgmmas": ("hopper::wgmma_wait<0>();", "", "wrong"),
    "a stage given back while it is read": ("wgmma_wait<1>()", "wgmma_wait<2>()", "wrong"),
    "no fence": ("hopper::wgmma_fence();", "", "without a fence"),
    "column chunks at the wrong distance": (
        "hopper::descriptor(right, S::kChunk)",
        "hopper::descriptor(right, S::kChunk / 2)",
        "wrong",
    ),
    "no swizzle in the column sums": ("(piece ^ token % 8)", "piece", "wrong"),
    "a reader too few": ("kReaders = 10", "kReaders = 9", "no thread can go on"),
    "a producer that does not wait": ("ring.phase ^ 1", "ring.phase", "no thread can go on"),
    "a reader too many": ("kReaders = 10", "kReaders = 11", "no thread can go on"),
    "a cluster that asks its own readers only": (
        "hopper::barrier_arrive_at(empty, uint32_t(lane))",
        "hopper::barrier_arrive(empty)",
        "wrong",
    ),
    "a share for one block only": ("(1 << kCluster) - 1", "1", "no thread can go on"),
}


def build_copy(source: Path) -> ctypes.CDLL:
    """Beside the source, not in the cache, which holds builds of this checkout."""
    library = source.with_suffix(".so")
    flags = (*liar_cuda_host.FLAGS, "-O0", "-I", str(liar_cuda_host.EMULATOR))
    command = ["g++", *flags, "-x", "c++", str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    loaded = ctypes.CDLL(str(library))
    loaded.cuda_host_report.restype = ctypes.c_char_p
    return loaded


@emulator
@pytest.mark.parametrize("change", BROKEN)
def test_the_emulator_notices(change, monkeypatch, tmp_path):
    before, after, symptom = BROKEN[change]
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    files = [sources / "cuda" / name for name in ("gram_sm90.cuh", "gram_shape.cuh")]
    assert sum(file.read_text().count(before) for file in files) == 1, f"{before!r}: update this"
    for file in files:
        file.write_text(file.read_text().replace(before, after))
    emulated = liar_gram_host.install(monkeypatch, build_copy(files[0].with_suffix(".cu")))
    found = ""
    for order in liar_cuda_host.ORDERS:
        emulated.order(*order)
        try:
            team = (
                {"cluster": 2, "blocks": 2}
                if "luster" in before or "lane" in before
                else {"blocks": 1}
            )
            check_exact(torch.device("cpu"), 136, 1500, 136, tile=256, **team)
        except AssertionError:
            found = "wrong"
        except RuntimeError as error:
            found = str(error)
        if symptom in found:
            return
    pytest.fail(f"expected {symptom!r}, got {found or 'a correct result'!r}")

"""Committed configurations, and which kernel, configuration and copies a call gets."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from liar_ext.errors import BackendError
from liar_ext.kernels import config as configs
from liar_ext.kernels import products, runtime, tune
from liar_ext.kernels.config import (
    DTYPES,
    KERNELS,
    Entry,
    ProductConfig,
    Table,
    config_for,
    fastest_kernel,
    read_table,
)

SMALL = ProductConfig(block=64, block_t=64, warps=4, stages=4, flush=8)
LARGE = ProductConfig(block=128, block_t=64, warps=8, stages=5, flush=8)
STAMP = {"device": "Some GPU", "ms": 2.0, "columns": 4096}


def entry(kernel="pointer", dtype="bfloat16", limit=None, config=LARGE, timed=None):
    return Entry(kernel, dtype, limit, config, timed)


TABLES = (
    Table((entry(limit=1024, config=SMALL), entry()), architecture=80),
    Table((entry(), entry("descriptor")), architecture=90),
    Table(
        (
            entry(config=SMALL, timed=STAMP),
            entry("descriptor", timed={**STAMP, "ms": 3.0}),
        ),
        device="Some GPU",
    ),
)


def test_every_architecture_has_every_dtype():
    found = {table.architecture: table for table in configs.tables() if table.device is None}
    assert sorted(found) == [80, 90, 100]
    for architecture, table in found.items():
        for kernel in KERNELS if architecture >= 90 else ["pointer"]:
            for dtype in DTYPES:
                for columns in (1, 768, 4096, 28672):
                    assert table.find(kernel, dtype, columns) is not None
        assert all(entry.timed is None for entry in table.entries)


def shipped_and_candidates():
    for table in configs.tables():
        for entry in table.entries:
            yield entry.dtype, entry.config
    for kernel in KERNELS:
        for dtype in DTYPES:
            for architecture in (80, 90, 100):
                for config in tune.candidates(kernel, dtype, architecture):
                    yield dtype, config


@pytest.mark.parametrize(
    ("dtype", "config"), list(dict.fromkeys(shipped_and_candidates())), ids=str
)
def test_tensor_core_sums_are_short(dtype, config):
    """Truncation costs about 2e-8 of an all-positive sum for each 16 tokens, one of six products in
    float32 being as large as the sum: 1e-6 are 50 steps."""
    assert config.flush_tokens / 16 * 2e-8 < 1e-6
    if dtype == "float32":
        # the small products of a second step would be added to a large sum
        assert config.flush == 1


@pytest.mark.parametrize(
    ("architecture", "columns", "config"),
    [(80, 4096, LARGE), (86, 1024, SMALL), (89, 1025, LARGE), (90, 64, LARGE), (120, 64, LARGE)],
)
def test_a_gpu_takes_the_newest_configuration_that_it_can_run(architecture, columns, config):
    found = config_for("pointer", "bfloat16", columns, architecture, None, TABLES)
    assert found == config


def test_what_was_timed_on_a_device_goes_first_there():
    assert config_for("pointer", "bfloat16", 4096, 90, "Some GPU", TABLES) == SMALL
    assert config_for("pointer", "bfloat16", 4096, 90, "Other GPU", TABLES) == LARGE


def test_a_narrower_class_of_sizes_goes_before_what_was_timed_for_a_wider_one():
    timed = Table((entry(config=SMALL, limit=4096, timed=STAMP),), device="Some GPU")
    narrow = ProductConfig(block=32, block_t=32, warps=4, stages=2, flush=1)
    older = Table((entry(limit=1024, config=narrow), entry()), architecture=90)
    found = [
        config_for("pointer", "bfloat16", columns, 90, "Some GPU", [timed, older])
        for columns in (64, 2048, 9999)
    ]
    assert found == [narrow, SMALL, LARGE]


def test_a_gpu_without_configurations_is_an_error_that_lists_those_there_are():
    with pytest.raises(ValueError, match=r"pointer kernel for bfloat16.*7\.5.*for 8\.0, 9\.0"):
        config_for("pointer", "bfloat16", 64, 75, None, TABLES)


def test_the_kernel_timed_to_be_faster_is_known_where_both_were():
    assert fastest_kernel("bfloat16", 64, "Some GPU", TABLES) == "pointer"
    assert fastest_kernel("float16", 64, "Some GPU", TABLES) is None
    assert fastest_kernel("bfloat16", 64, "Other GPU", TABLES) is None
    single = Table((entry(timed=STAMP),), device="Some GPU")
    assert fastest_kernel("bfloat16", 64, "Some GPU", [single]) is None
    sizes = Table((entry(timed=STAMP), entry("descriptor", limit=99, timed=STAMP)), device="A")
    assert fastest_kernel("bfloat16", 64, "A", [sizes]) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 96}, "block must be one of .*; got 96"),
        ({"warps": 3}, "warps must be one of .*; got 3"),
        ({"flush": 0}, r"flush must be one of 1\.\.128; got 0"),
        ({"stages": 9}, r"stages must be one of 1\.\.8; got 9"),
    ],
)
def test_launch_parameters_are_checked(change, message):
    values = {"block": 64, "block_t": 64, "warps": 4, "stages": 3, "flush": 1}
    with pytest.raises(ValueError, match=message):
        ProductConfig(**{**values, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "atomic"}, "kernel must be one of pointer, descriptor; got 'atomic'"),
        ({"dtype": "int8"}, "dtype must be one of .*; got 'int8'"),
        ({"max_columns": 0}, "max_columns must be positive or null; got 0"),
        ({"colour": 1}, "an entry has .*; got .*colour"),
        ({"config": {"block": 64}}, "missing"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path, change, message):
    data = {"architecture": 90, "entries": [{**entry().to_json(), **change}]}
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"sm_90\.json: .*{message}"):
        read_table(path)


def test_a_table_is_for_an_architecture_or_a_device_it_was_timed_on():
    with pytest.raises(ValueError, match="an architecture or a device"):
        Table((entry(),))
    with pytest.raises(ValueError, match="Some GPU were not timed"):
        Table((entry(),), device="Some GPU")


UNALIGNED = {
    "odd-width": lambda x: x[:, :100],
    "odd-offset": lambda x: x[:, 1:97],
    "columns-apart": lambda x: x[:, ::2],
    "transposed": lambda x: x.T,
    "one-row-repeated": lambda x: x[:1].expand(112, -1),
}


class TestPlan:
    """The choice on a GPU that is not here: its capability is the test's own."""

    @pytest.fixture
    def gpu(self, monkeypatch):
        monkeypatch.delenv(products.VARIABLE, raising=False)

        def be(capability: int) -> None:
            monkeypatch.setattr(runtime, "interprets", lambda device: False)
            monkeypatch.setattr(runtime, "capability", lambda device: capability)
            monkeypatch.setattr(runtime, "device_name", lambda device: "Some GPU")

        return be

    @pytest.mark.parametrize(
        ("capability", "dtype", "columns", "masked", "ordered", "kernel", "packs"),
        [
            (90, torch.bfloat16, 256, False, False, "descriptor", False),
            (90, torch.float16, 256, True, False, "pointer", False),
            (90, torch.bfloat16, 256, True, True, "descriptor", True),
            (90, torch.bfloat16, 250, True, False, "descriptor", True),
            (90, torch.float32, 256, False, False, "descriptor", True),
            (120, torch.bfloat16, 256, False, False, "descriptor", False),
            (80, torch.bfloat16, 256, True, False, "pointer", False),
            (89, torch.bfloat16, 256, False, True, "pointer", True),
            (80, torch.float32, 256, False, False, "pointer", True),
        ],
    )
    def test_kernel_and_copies(
        self, gpu, capability, dtype, columns, masked, ordered, kernel, packs
    ):
        gpu(capability)
        chosen = products.plan([torch.zeros(4, columns, dtype=dtype)], masked, ordered)
        assert (chosen.kernel, chosen.packs) == (kernel, packs)
        assert chosen.planes == (3 if dtype == torch.float32 else 1)

    def test_the_kernel_timed_to_be_faster_is_taken(self, gpu, monkeypatch):
        gpu(90)
        monkeypatch.setattr(configs, "tables", lambda: TABLES)
        x = torch.zeros(4, 256, dtype=torch.bfloat16)
        assert products.plan([x], False, False).kernel == "pointer"
        assert products.plan([x], False, False).config == SMALL

    @pytest.mark.parametrize("view", UNALIGNED.values(), ids=UNALIGNED.keys())
    @pytest.mark.parametrize("capability", [80, 90])
    def test_what_cannot_be_read_in_place_is_packed(self, gpu, capability, view):
        gpu(capability)
        x = torch.zeros(112, 192, dtype=torch.bfloat16)
        assert not products.plan([x], False, False).packs
        assert products.plan([view(x)], False, False).packs
        assert products.plan([x, view(x)], False, False).packs

    def test_a_forced_descriptor_kernel_packs_masks(self, gpu):
        gpu(90)
        chosen = products.plan([torch.zeros(4, 32).bfloat16()], True, False, "descriptor")
        assert (chosen.kernel, chosen.packs) == ("descriptor", True)

    def test_a_forced_kernel_that_cannot_run_says_why(self, gpu, monkeypatch):
        gpu(80)
        x = torch.zeros(4, 32)
        with pytest.raises(BackendError, match=r"capability 9\.0 or newer.*8\.0: use pointer"):
            products.plan([x], False, False, "descriptor")
        monkeypatch.setenv(products.VARIABLE, "descriptor")
        with pytest.raises(BackendError, match=r"capability 9\.0 or newer"):
            products.plan([x], False, False)

    def test_names_of_kernels_are_checked(self, gpu, monkeypatch):
        gpu(90)
        with pytest.raises(BackendError, match="'fast'.*pointer, descriptor"):
            products.plan([torch.zeros(4, 32)], False, False, "fast")
        monkeypatch.setenv(products.VARIABLE, "fast")
        with pytest.raises(BackendError, match="LIAR_GRAM_KERNEL=fast.*pointer, descriptor"):
            products.plan([torch.zeros(4, 32)], False, False)

    def test_an_old_gpu_and_a_strange_dtype_are_refused(self, gpu):
        gpu(75)
        with pytest.raises(BackendError, match=r"7\.5.*set LIAR_BACKEND=torch"):
            products.plan([torch.zeros(4, 32)], False, False)
        with pytest.raises(BackendError, match=r"torch\.float64"):
            products.plan([torch.zeros(4, 32, dtype=torch.float64)], False, False)

    @pytest.mark.parametrize("columns", [64, 11008, 28672])
    def test_packed_copies_are_bounded(self, gpu, columns):
        gpu(90)
        chosen = products.plan([torch.zeros(1, columns)], False, True)
        assert 4096 <= chosen.tokens <= products.TOKENS
        assert chosen.tokens * columns * 6 <= products.PACKED_BYTES
        assert chosen.tokens % chosen.config.flush_tokens == 0

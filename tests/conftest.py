"""What every test runs under: offline, seeded, and Triton interpreted where there is no GPU."""

from __future__ import annotations

import os

# before torch: transformers reads HF_HUB_OFFLINE at import
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("LIAR_BACKEND", None)
# workers of pytest-xdist have one; output is then cut to it, as it is not elsewhere
os.environ.pop("COLUMNS", None)
# workers of pytest-xdist share the cores: with a thread for each core in each of them, threads wait
# for one another (two workers on two cores: 25 min of processor time for 3/4 of the suite; so, 18
# for all of it)
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch

HAS_GPU = torch.cuda.device_count() > 0
# before anything imports the kernels: triton reads this when it decorates them
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(min(torch.get_num_threads(), 8))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip by name, with the reason, what needs a GPU where there is none and what is slow."""
    skips = {}
    if not HAS_GPU:
        skips["gpu"] = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    if not config.getoption("--slow"):
        skips["slow"] = pytest.mark.skip(reason="takes more than 20 s: --slow runs it")
    for item in items:
        for name, skip in skips.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch):
    """`backend("torch")` forces a backend for the rest of the test."""
    return lambda name: monkeypatch.setenv("LIAR_BACKEND", name)

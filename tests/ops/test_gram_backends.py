"""Which implementation runs, and what happens when the forced one cannot."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from liar_ext.errors import BackendError
from liar_ext.ops import _extension, backends, gram

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
CPU = torch.device("cpu")
X = torch.ones(3, 2)


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(_extension, "_load", lambda: "not built, says the test")


@pytest.mark.skipif(_extension.unavailable() is not None, reason="the extension is not built")
def test_the_compiled_version_is_preferred_on_a_cpu():
    assert backends.select("gram", CPU, torch.float32).backend == "cpu"


def test_torch_runs_where_the_extension_is_not_built(no_extension):
    assert backends.select("gram", CPU, torch.float32).backend == "torch"


def test_torch_runs_what_the_extension_cannot():
    assert backends.select("gram", CPU, torch.float64).backend == "torch"


@pytest.mark.parametrize("name", ["reference", "torch", pytest.param("triton", marks=needs_triton)])
def test_a_forced_backend_runs(backend, name):
    backend(name)
    assert backends.select("gram", CPU, torch.float32).backend == name


def test_a_forced_backend_that_is_not_built_is_an_error(backend, no_extension):
    backend("cpu")
    with pytest.raises(BackendError, match=r"LIAR_BACKEND=cpu cannot run gram.*not built, says"):
        gram(X)


def test_a_forced_backend_of_another_device_is_an_error(backend):
    backend("cuda")
    with pytest.raises(
        BackendError, match=r"LIAR_BACKEND=cuda cannot run gram.*needs a CUDA tensor, not cpu"
    ):
        gram(X)


@pytest.mark.parametrize(
    ("setting", "gram_backend", "solve_backend"),
    [
        pytest.param("triton", "triton", "torch", marks=needs_triton),
        ("reference", "reference", "reference"),
        ("gram=torch", "torch", "torch"),
        ("solve=reference, gram=torch", "torch", "reference"),
        ("solve=reference,torch", "torch", "reference"),
        ("torch,solve=reference", "torch", "reference"),
    ],
)
def test_a_backend_can_be_forced_on_all_ops_that_have_it_or_on_one(
    backend, setting, gram_backend, solve_backend
):
    backend(setting)
    assert backends.select("gram", CPU, torch.float32).backend == gram_backend
    assert backends.select("solve", CPU, torch.float64).backend == solve_backend


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("solve=triton", "LIAR_BACKEND=solve=triton cannot run solve.*no triton implementation"),
        ("grahm=torch", "grahm is no op; use one of cosine, cross, gram, pack, solve"),
        ("gram=numpy", "'numpy' is no backend; use one of reference"),
        ("gram=torch,gram=cpu", "gram twice"),
        ("torch,cpu", "all ops twice"),
        ("gram=torch,,", "'' is no backend"),
    ],
)
def test_a_wrong_setting_is_named(backend, setting, message):
    backend(setting)
    with pytest.raises(BackendError, match=message):
        backends.select("solve", CPU, torch.float64)


@needs_triton
def test_triton_without_a_gpu_or_its_interpreter_is_an_error(backend, monkeypatch):
    backend("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match=r"needs a CUDA tensor.*TRITON_INTERPRET"):
        gram(X)


def test_a_forced_backend_of_another_dtype_is_an_error(backend):
    backend("triton")
    with pytest.raises(BackendError, match=r"float32, not in torch\.float64"):
        backends.select("gram", CPU, torch.float64)


def test_an_unknown_backend_is_an_error_that_lists_the_known(backend):
    backend("numpy")
    with pytest.raises(BackendError, match=r"LIAR_BACKEND=numpy.*reference, torch, cpu"):
        gram(X)


def test_registering_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'numpy'"):
        backends.register("gram", "numpy")


def test_describe_lists_every_backend_with_a_reason_for_each_missing_one(no_extension):
    rows = {row.backend: row for row in backends.describe("cpu") if row.op == "gram"}
    assert tuple(rows) == backends.NAMES
    assert rows["torch"].available
    assert rows["torch"].reason is None
    assert not rows["cpu"].available
    assert rows["cpu"].reason == "not built, says the test"


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_importing_loads_neither_triton_nor_the_extension(where, tmp_path):
    code = (
        "import sys, torch, liar_ext, liar_ext.ops, liar_ext.kernels, liar_ext.ops.backends\n"
        "heavy = {'triton', 'liar_ext.ops._native'} & set(sys.modules)\n"
        "print(len(heavy), torch.cuda.is_initialized())"
    )
    assert run_python(code, ROOT if where == "root" else tmp_path).split() == ["0", "False"]


def test_transformers_models_import_beside_the_kernels_folder():
    """With the repository root first on sys.path, as `python -c` puts it."""
    code = "import kernels, transformers; transformers.LlamaForCausalLM; print(kernels.__file__)"
    assert run_python(code, ROOT).strip() == str(ROOT / "kernels" / "__init__.py")


def test_the_kernels_folder_does_not_pass_for_the_package_of_that_name():
    import liar_ext.kernels

    assert not hasattr(liar_ext.kernels, "__version__")


@pytest.mark.parametrize("setting", ["solve=cuda", "gram=cuda", "grahm=torch"])
def test_a_setting_that_cannot_run_is_refused_before_any_work(backend, setting):
    from liar_ext.engine.inputs import check_backends

    backend(setting)
    with pytest.raises(BackendError, match=f"LIAR_BACKEND={setting}"):
        check_backends(CPU)


def test_settings_that_can_run_are_accepted(backend):
    from liar_ext.engine.inputs import check_backends

    for setting in ("torch", "gram=torch,solve=reference", ""):
        backend(setting)
        check_backends(CPU)

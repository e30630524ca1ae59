"""What `pip` builds: the three modes, their content, and why a mode cannot be built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from liar_setup import load_setup

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "src", "kernels", "csrc")


@pytest.fixture
def tree(tmp_path):
    """A copy without build products: a build in the checkout would leave some there."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            skip = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
            shutil.copytree(source, copy / name, ignore=skip)
        elif source.exists():
            shutil.copy(source, copy / name)
    return copy


def run(*command, cwd, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LIAR_", "PYTHON"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**env, **environment},
        capture_output=True,
        text=True,
    )


def build_wheel(tree: Path, mode: str) -> Path:
    out = tree.parent / "wheels"
    done = run(
        *(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            out,
            ".",
        ),
        cwd=tree,
        LIAR_EXT_BUILD=mode,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def test_a_pure_python_wheel_holds_everything_but_the_extension(tree):
    wheel = build_wheel(tree, "python")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry = next(n for n in names if n.endswith("entry_points.txt"))
        assert "liar = liar_ext.cli:main" in archive.read(entry).decode()
    expected = {
        str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "liar_ext").rglob("*.py")
    }
    expected |= {
        f"liar_ext/kernels/{path.relative_to(ROOT / 'kernels')}"
        for suffix in ("*.py", "*.json")
        for path in (ROOT / "kernels").rglob(suffix)
    }
    expected |= {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "liar_ext" / "demo").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sorted(expected - names) == []
    assert "liar_ext/py.typed" in names
    packages = {name.split("/")[0] for name in names}
    assert {p for p in packages if not p.endswith(".dist-info")} == {"liar_ext"}
    assert not any(name.endswith(".so") for name in names)


@pytest.mark.skipif(load_setup().cpu_obstacle() is not None, reason="no C++ compiler")
def test_a_cpu_wheel_runs_its_extension_from_where_it_is_installed(tree):
    wheel = build_wheel(tree, "cpu")
    with zipfile.ZipFile(wheel) as archive:
        built = [n for n in archive.namelist() if n.endswith(".so")]
    assert len(built) == 1
    assert built[0].startswith("liar_ext/ops/_native.")
    site = tree.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import torch, liar_ext.ops as ops, liar_ext.kernels\n"
        "print(ops.gram(torch.ones(3, 2)).gram[1].tolist(), ops.__file__)"
    )
    # -P keeps the checkout out, PYTHONPATH puts the wheel before the editable install
    done = run(
        *(sys.executable, "-P", "-c", code), cwd=site, PYTHONPATH=str(site), LIAR_BACKEND="cpu"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"[3.0, 3.0] {site / 'liar_ext' / 'ops' / '__init__.py'}"


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
@pytest.mark.skipif(load_setup().cuda_home() is None, reason="no CUDA toolkit")
def test_forcing_cuda_beside_a_cpu_torch_is_an_error_that_says_so(tree):
    done = run(sys.executable, "setup.py", "--version", cwd=tree, LIAR_EXT_BUILD="cuda")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == (
        "error: LIAR_EXT_BUILD=cuda cannot be built: "
        "torch is a CPU-only build: install a CUDA build of torch first"
    )


def test_auto_falls_back_one_mode_at_a_time_and_says_why(monkeypatch, capsys):
    setup = load_setup()
    monkeypatch.setattr(setup, "cuda_obstacle", lambda: "no toolkit, says the test")
    monkeypatch.setattr(setup, "cpu_obstacle", lambda: "no compiler, says the test")
    assert setup.choose("auto") == "python"
    assert capsys.readouterr().out.splitlines() == [
        "liar-ext: not building mode cuda: no toolkit, says the test",
        "liar-ext: not building mode cpu: no compiler, says the test",
        "liar-ext: building mode python",
    ]


def test_forcing_cpu_without_a_compiler_is_an_error(monkeypatch):
    setup = load_setup()
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SystemExit, match=r"LIAR_EXT_BUILD=cpu cannot be built: no C\+\+ compiler"):
        setup.choose("cpu")


def test_an_unknown_mode_is_an_error_that_lists_the_known():
    with pytest.raises(SystemExit, match="'gpu': use one of auto, cuda, cpu, python"):
        load_setup().choose("gpu")


def test_an_nvcc_that_fails_is_an_error_that_setuptools_knows(tmp_path, monkeypatch):
    """So that an optional extension is left out with a warning, and another names the file."""
    from setuptools.errors import CompileError

    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 3\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(CompileError, match=r"nvcc failed with exit code 3 for csrc/cuda/x\.cu"):
        load_setup().compile_cuda(["csrc/cuda/x.cu"], tmp_path / "objects")


@pytest.mark.slow
@pytest.mark.skipif(load_setup().cuda_home() is None, reason="no CUDA toolkit")
@pytest.mark.skipif(load_setup().cpu_obstacle() is not None, reason="no C++ compiler")
def test_a_cuda_extension_links_and_imports_without_a_gpu(tree):
    """The check for a CUDA torch is the only thing left out: everything else is the real build."""
    script = tree / "build_cuda.py"
    script.write_text("import setup\nsetup.cuda_obstacle = lambda: None\nsetup.main()\n")
    done = run(*(sys.executable, script, "build_ext", "--inplace"), cwd=tree, LIAR_EXT_BUILD="cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    setup, objects = load_setup(), list(tree.rglob("*.cu.o"))
    assert len(objects) == len(setup.sources(".cu"))
    for file in objects:
        # fat binaries name their architectures; `strings` would need binutils
        for arch in setup.CUDA_ARCHS:
            assert f"sm_{arch}".encode() in file.read_bytes(), f"{file} has no code for sm_{arch}"
    code = "import liar_ext.ops._extension as e; print(e.__file__); print(e.cuda_info())"
    done = run(sys.executable, "-P", "-c", code, cwd=tree, PYTHONPATH=str(tree / "src"))
    assert done.returncode == 0, done.stderr
    where, info = done.stdout.strip().splitlines()
    assert where == str(tree / "src" / "liar_ext" / "ops" / "_extension.py")
    assert "'compiled': '80 90a'" in info

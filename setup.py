"""Build of the native extension; everything else about the package is in pyproject.toml.

`LIAR_EXT_BUILD` chooses what is compiled:

    auto    (default) the first of the three below that can be built, with a printed line
    cuda    csrc/ with its CUDA sources: needs nvcc, and a CUDA build of torch to run beside
    cpu     csrc/ without them: needs a C++17 compiler
    python  nothing: a pure-Python package

A forced mode that cannot be built is an error that says why.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cuda", "cpu", "python")
CUDA_ARCHS = ("80", "90a")
CXX_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra"]
# gcc 12 warns about the uninitialised operand inside its own avx512 headers
CXX_FLAGS += ["-Wno-maybe-uninitialized"]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []


def sources(suffix: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob(f"*{suffix}"))


def cuda_home() -> Path | None:
    """The toolkit folder. Never derived from the nvcc on PATH: that can be a wrapper script."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for candidate in candidates:
        if candidate and (Path(candidate) / "bin" / "nvcc").is_file():
            return Path(candidate)
    return None


def torch_cuda() -> str | None:
    """The CUDA version of the torch that the package will run with; None without one.

    Asked of the interpreter without PYTHONPATH, so that an isolated build, which has no torch of
    its own, sees the environment it installs into.
    """
    # its version.py alone: importing torch takes seconds, and pip asks twice
    probe = (
        "import os, runpy; from importlib.util import find_spec; "
        "folder = os.path.dirname(find_spec('torch').origin); "
        "print(runpy.run_path(os.path.join(folder, 'version.py'))['cuda'] or '')"
    )
    found = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def cuda_obstacle() -> str | None:
    """Why the CUDA sources cannot be built here, or None."""
    if (reason := nvcc_obstacle()) is not None:
        return reason
    version = torch_cuda()
    if version is None:
        return "torch cannot be imported in this environment: install a CUDA build of torch first"
    if not version:
        return "torch is a CPU-only build: install a CUDA build of torch first"
    return cpu_obstacle()


def nvcc_obstacle() -> str | None:
    """Why no .cu file can be compiled here, or None."""
    if cuda_home() is None:
        return "no CUDA toolkit: set CUDA_HOME to the folder that holds bin/nvcc"
    # nvcc preprocesses with the host compiler
    return None if shutil.which("g++") else "nvcc needs a host compiler, and g++ is not on PATH"


def cpu_obstacle() -> str | None:
    """Why the C++ sources cannot be built here, or None."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not any(shutil.which(name) for name in (compiler, "g++", "clang++")):
        return f"no C++ compiler: neither {compiler}, g++ nor clang++ is on PATH"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 is not installed: pip install pybind11, or build with isolation"
    return None


def choose(mode: str) -> str:
    """The mode to build, after the check that it can be."""
    if mode not in MODES:
        raise SystemExit(f"error: LIAR_EXT_BUILD={mode!r}: use one of {', '.join(MODES)}")
    obstacles = {"cuda": cuda_obstacle, "cpu": cpu_obstacle, "python": lambda: None}
    for candidate in obstacles if mode == "auto" else [mode]:
        reason = obstacles[candidate]()
        if reason is None:
            print(f"liar-ext: building mode {candidate}", flush=True)
            return candidate
        if mode != "auto":
            raise SystemExit(f"error: LIAR_EXT_BUILD={mode} cannot be built: {reason}")
        print(f"liar-ext: not building mode {candidate}: {reason}", flush=True)
    raise AssertionError("unreachable: python can always be built")


def compile_cuda(files: list[str], out: Path, archs: tuple[str, ...] = CUDA_ARCHS) -> list[str]:
    """Objects of the .cu files in `out`: code for every arch, PTX of the first for later ones."""
    home = cuda_home()
    if home is None:
        raise FileNotFoundError(cuda_obstacle())
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    gencode.append(f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}")
    # --threads 0: the architectures of a file at the same time
    flags = ["-O3", "-std=c++17", "--threads", "0"]
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode]
    out.mkdir(parents=True, exist_ok=True)

    def compile_one(file: str) -> str:
        target = out / (Path(file).stem + ".cu.o")
        command = [str(home / "bin" / "nvcc"), *flags, "-c", str(ROOT / file), "-o", str(target)]
        print(" ".join(command), flush=True)
        if (code := subprocess.run(command).returncode) != 0:
            # what setuptools knows: an optional extension is then left out, with a warning
            raise CompileError(f"nvcc failed with exit code {code} for {file}")
        return str(target)

    # the templates of one file take 20 s: a file for each processor at a time
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, files))


class Build(build_ext):
    """build_ext that compiles the .cu files beside the others, and links when both are done."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        ext.include_dirs.append(pybind11.get_include())
        if not ext.cuda:
            return super().build_extension(ext)
        link = self.compiler.link_shared_object
        with ThreadPoolExecutor(1) as pool:
            compiled = pool.submit(compile_cuda, sources(".cu"), Path(self.build_temp))
            self.compiler.link_shared_object = lambda objects, *args, **options: link(
                [*objects, *compiled.result()], *args, **options
            )
            try:
                super().build_extension(ext)
            finally:
                self.compiler.link_shared_object = link
            # nothing is linked where the module is newer than its sources
            compiled.result()


def extension(mode: str, optional: bool) -> Extension:
    ext = Extension(
        "liar_ext.ops._native",
        sources(".cpp"),
        depends=[*sources(".h"), *sources(".cu"), *sources(".cuh")],
        extra_compile_args=[*CXX_FLAGS, *OPENMP],
        extra_link_args=OPENMP,
        libraries=["dl"] if sys.platform == "linux" else [],
        language="c++",
        # auto only: a compiler that is there and fails leaves a pure-Python package and a warning
        optional=optional,
    )
    ext.cuda = mode == "cuda"
    if ext.cuda:
        # the static runtime: the module then imports on machines without CUDA libraries
        ext.define_macros.append(("LIAR_CUDA", f'"{" ".join(CUDA_ARCHS)}"'))
        ext.library_dirs.append(str(cuda_home() / "lib64"))
        ext.libraries += ["cudart_static", "rt", "pthread"]
    return ext


def main() -> None:
    asked = os.environ.get("LIAR_EXT_BUILD", "auto")
    mode = choose(asked)
    setup(
        packages=sorted({"liar_ext", "liar_ext.kernels", *find_packages("src")}),
        package_dir={"": "src", "liar_ext.kernels": "kernels"},
        ext_modules=[] if mode == "python" else [extension(mode, optional=asked == "auto")],
        cmdclass={"build_ext": Build},
    )


if __name__ == "__main__":
    main()

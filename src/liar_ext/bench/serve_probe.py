"""A model in a process of its own: how long it takes to load, and what is resident while it runs.

`measured` starts `python -m liar_ext.bench.serve_probe`, which reads one JSON object from standard
input and writes one to standard output.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# pages of a file that are looked at, to see whether it is in memory
LOOKS = 64


def measured(
    source: Mapping[str, Any],
    workloads: Sequence[Mapping[str, int]],
    *,
    device: str,
    dtype: str,
    round_to: int,
    target: Sequence[str],
) -> dict[str, Any]:
    """Load a model in a new process and, on a CPU, run it.

    Args:
        source: `Source.to_json()`. dtype: as torch names it.
        workloads: `batch`, `prompt` and `new_tokens` of each.
    Returns:
        `import_s` (the process until its libraries are there), `load_s` and `load_warm_s` (to a
        model on the device, cold and once more; None of random weights), `page_cache` (what
        `cold` means), `base_bytes` (resident with the libraries alone), and `peaks`, one for each
        workload: the most that was resident, libraries included; empty on a GPU.
        Or `reason`, why there is none of this.
    """
    import torch

    asked = {
        "source": dict(source),
        "workloads": [dict(own) for own in workloads],
        "device": device,
        "dtype": dtype,
        "round_to": round_to,
        "target": list(target),
        "threads": torch.get_num_threads(),
        "started": time.time(),
    }
    # -P: the working directory may have folders with names of packages
    command = [sys.executable, "-P", "-m", "liar_ext.bench.serve_probe"]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        killed = f"ended by signal {-done.returncode}, as for lack of memory"
        return {"reason": killed if done.returncode < 0 else (said[-1] if said else "no answer")}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def evict(files: Sequence[Path]) -> str:
    """Ask the system to forget the pages of some files; what is left of them, in words."""
    before, after = _resident(files), None
    if before is None:
        return "kept: this system does not tell what is in its page cache"
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    after = _resident(files)
    return f"emptied of the weight files: {before:.0%} of the pages were in it, {after:.0%} after"


def _resident(files: Sequence[Path]) -> float | None:
    """The share of some pages that can be read without waiting for the disk."""
    if not (hasattr(os, "RWF_NOWAIT") and hasattr(os, "posix_fadvise")):
        return None
    there, looked = 0, 0
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            # a look must not make the system read ahead
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            size = os.fstat(descriptor).st_size
            for at in range(LOOKS):
                looked += 1
                try:
                    there += os.preadv(
                        *(descriptor, [bytearray(1)], at * max(size - 1, 0) // LOOKS),
                        os.RWF_NOWAIT,
                    )
                except BlockingIOError:
                    pass
                except OSError:
                    return None
        finally:
            os.close(descriptor)
    return there / looked if looked else None


def answer(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What `measured` returns, in this process."""
    import torch

    from liar_ext.bench.serve_lanes import lane
    from liar_ext.bench.serve_models import Source, outline, serve
    from liar_ext.bench.serve_prompts import drawn
    from liar_ext.checkpoint.reader import CheckpointReader
    from liar_ext.comparison.subject import reset_peak
    from liar_ext.engine.allocator import steady_allocator
    from liar_ext.engine.compression import peak_host_bytes, resident_host_bytes

    steady_allocator()
    torch.set_num_threads(asked["threads"])
    source, device = Source(**asked["source"]), torch.device(asked["device"])
    dtype = getattr(torch, asked["dtype"])
    folder = Path(source.folder)
    # a context of CUDA, the threads of a CPU and the code of the model's class are not the model's
    torch.ones(64, 64, device=device).mm(torch.ones(64, 64, device=device)).sum().item()
    known = outline(source, target=tuple(asked["target"]), round_to=asked["round_to"])
    import_s, base = time.time() - asked["started"], resident_host_bytes()
    files = [] if source.random else [folder / name for name in CheckpointReader(folder).files()]
    page_cache = None if source.random else evict(files)

    def loaded() -> tuple[Any, float]:
        begun = time.perf_counter()
        model = serve(known, device, dtype)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return model, time.perf_counter() - begun

    served, cold = loaded()
    peaks = []
    with torch.no_grad():
        for work in asked["workloads"] if device.type == "cpu" else ():
            ids = drawn(work["batch"], work["prompt"], known.vocabulary, device)
            gc.collect()
            reset_peak()
            lane(served.model, known.kind, ids, work["new_tokens"], "eager").round()
            peaks.append(peak_host_bytes())
    del served
    gc.collect()
    warm = None if source.random else loaded()[1]
    return {
        "import_s": import_s,
        "load_s": None if source.random else cold,
        "load_warm_s": warm,
        "page_cache": page_cache,
        "base_bytes": base,
        "peaks": peaks,
    }


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.stdin.read()))))

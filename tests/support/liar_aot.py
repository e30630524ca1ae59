"""Compile the Triton kernels for GPUs that need not be here; prints one JSON object per variant.

Run as a script in a process of its own: TRITON_INTERPRET is read when a kernel is decorated, and
the test process interprets. Registers and spills come from `ptxas -v`, since asking Triton for them
needs a device.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from liar_ext.kernels import gram

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def ptxas(capability: int) -> str:
    """The assembler of this Triton; 3.6 takes no argument or returns a tuple, later ones do not."""
    try:
        found = get_ptxas(capability)
    except TypeError:
        found = get_ptxas()
    found = found[0] if isinstance(found, tuple) else found
    return getattr(found, "path", found)


def compile_for(function, signature, constants, capability, aligned=(), **options):
    """Resources of one kernel variant on one architecture."""
    positions = {name: index for index, name in enumerate(function.arg_names)}
    source = ASTSource(
        fn=function,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(positions[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    text = kernel.asm["ptx"]
    arch = re.search(r"\.target (\w+)", text).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        command = [ptxas(capability), "-v", f"-arch={arch}", file.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    return {
        "registers": int(re.search(r"Used (\d+) registers", log).group(1)),
        "spill": sum(spills),
        "stack": int(re.search(r"(\d+) bytes stack frame", log).group(1)),
        "shared": kernel.metadata.shared,
        "tensor_core": text.count("wgmma.mma_async") + text.count("mma.sync"),
        "async_copies": text.count("cp.async.cg") + text.count("cp.async.ca"),
    }


def gram_variants(capability):
    for dtype, config in gram.CONFIGS[capability].items():
        element = NAMES[dtype]
        for masked in (False, True):
            signature = {
                "x_ptr": f"*{element}",
                "mask_ptr": "*u8" if masked else f"*{element}",
                "gram_ptr": "*fp32",
                "tokens": "i32",
                "columns": "i32",
                "panel": "i32",
                "x_stride": "i32",
                "gram_stride": "i32",
            }
            constants = {
                "HAS_MASK": masked,
                "UPCAST": False,
                "BLOCK": config.block,
                "BLOCK_T": config.block_t,
            }
            row = compile_for(
                gram.gram_kernel,
                signature,
                constants,
                capability,
                aligned=(
                    "x_ptr",
                    "mask_ptr",
                    "gram_ptr",
                    "columns",
                    "panel",
                    "x_stride",
                    "gram_stride",
                ),
                num_warps=config.warps,
                num_stages=config.stages,
            )
            yield {"kernel": "gram", "dtype": element, "mask": masked, **row}
    for element in NAMES.values():
        signature = {
            "x_ptr": f"*{element}",
            "mask_ptr": "*u8",
            "out_ptr": "*fp64",
            "tokens": "i32",
            "columns": "i32",
            "x_stride": "i32",
        }
        constants = {
            "HAS_MASK": True,
            "SPAN": gram.SUM_TOKENS,
            "BLOCK": gram.SUM_COLUMNS,
            "BLOCK_T": gram.SUM_STEP,
        }
        row = compile_for(gram.sum_kernel, signature, constants, capability, aligned=("x_ptr",))
        yield {"kernel": "sum", "dtype": element, "mask": True, **row}


if __name__ == "__main__":
    arch = int(sys.argv[1])
    for variant in gram_variants(arch):
        print(json.dumps({"arch": arch, **variant}), flush=True)

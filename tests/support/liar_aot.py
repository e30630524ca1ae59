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
from dataclasses import asdict

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from liar_ext.kernels import config as configs
from liar_ext.kernels import cosine, gram_descriptor, gram_pointer, pack, tune

ELEMENTS = {"bfloat16": "bf16", "float16": "fp16", "float32": "bf16"}


def ptxas(capability: int) -> str:
    """The assembler of this Triton; 3.6 takes no argument or returns a tuple, later ones do not."""
    try:
        found = get_ptxas(capability)
    except TypeError:
        found = get_ptxas()
    found = found[0] if isinstance(found, tuple) else found
    return getattr(found, "path", found)


def compile_for(function, types, constants, capability, aligned=(), **options):
    """Resources of one kernel variant on one architecture."""
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    text = kernel.asm["ptx"]
    arch = re.search(r"\.target (\w+)", text).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        command = [ptxas(capability), "-v", f"-arch={arch}", file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    log = done.stdout + done.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    additions = re.findall(r"\badd(?:\.rn)?\.f32(x2)?\b", text)
    return {
        "registers": int(re.search(r"Used (\d+) registers", log).group(1)),
        "spill": sum(spills),
        "stack": int(re.search(r"(\d+) bytes stack frame", log).group(1)),
        "serialised": "serialized" in log,
        "shared": kernel.metadata.shared,
        "wgmma": text.count("wgmma.mma_async"),
        "mma": text.count("mma.sync"),
        "tcgen05": text.count("tcgen05.mma"),
        "copies": text.count("cp.async.cg") + text.count("cp.async.ca"),
        "tensor_copies": text.count("cp.async.bulk.tensor"),
        # a wait for all but the last product: steps overlap
        "overlaps": bool(re.search(r"wgmma\.wait_group\.sync\.aligned\s+1", text)),
        "additions": sum(2 if packed else 1 for packed in additions),
        "loads": len(re.findall(r"\bld\.global\b", text)),
        "wide_loads": len(re.findall(r"\bld\.global(?:\.\w+)*\.v4\b", text)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.(?!sync)", text)),
        "flushes_subnormals": ".ftz" in text,
    }


def product_variant(kernel, dtype, config, capability, masked=False, odd=False):
    """`odd`: an output whose sizes and stride are no multiples of 16."""
    element, planes = ELEMENTS[dtype], 3 if dtype == "float32" else 1
    constants = {
        "PLANES": planes,
        "UPCAST": False,
        "BLOCK": config.block,
        "BLOCK_T": config.block_t,
        "FLUSH": config.flush,
        "GROUP": config.group,
    }
    integers = ["tokens", "rows", "columns", "out_stride", "triangle"]
    aligned = ["out_ptr"] if odd else ["out_ptr", "rows", "columns", "out_stride"]
    if kernel == "pointer":
        function = gram_pointer.pointer_kernel
        constants["HAS_MASK"] = masked
        strides = ["x_width", "y_width", "x_plane", "y_plane", "x_stride", "y_stride"]
        types = dict.fromkeys([*strides, *integers], "i32")
        types |= {"x_ptr": f"*{element}", "y_ptr": f"*{element}", "out_ptr": "*fp32"}
        types["mask_ptr"] = "*u8" if masked else f"*{element}"
        aligned += [*strides, "x_ptr", "y_ptr", "mask_ptr"]
    else:
        function = gram_descriptor.descriptor_kernel
        types = dict.fromkeys(integers, "i32")
        types["out_ptr"] = "*fp32"
        for operand in "xy":
            for index, plane in enumerate("hml"):
                if index < planes:
                    block = f"{config.block_t}, {config.block}"
                    types[f"{operand}{plane}_desc"] = f"tensordesc<{element}[{block}]>"
                else:
                    constants[f"{operand}{plane}_desc"] = None
    options = {"num_warps": config.warps, "num_stages": config.stages}
    row = compile_for(function, types, constants, capability, aligned, **options)
    return {
        "kernel": kernel,
        "dtype": dtype,
        "masked": masked,
        "odd": odd,
        "config": asdict(config),
        **row,
    }


def product_variants(capability, candidates):
    """Every committed configuration and, if wanted, every candidate, each once.

    Odd outputs for committed configurations only, and float16 with neither those nor masks.
    """
    (table,) = (table for table in configs.tables() if table.architecture == capability)
    seen = set()
    for entry in table.entries:
        key = (entry.kernel, entry.dtype, entry.config)
        for masked in (False, True) if entry.kernel == "pointer" else (False,):
            # masks of float32 are applied by the packing
            if entry.dtype == "bfloat16" or not masked:
                seen.add((*key, masked))
                yield product_variant(*key, capability, masked)
        if entry.dtype != "float16":
            yield product_variant(*key, capability, odd=True)
    for kernel in configs.KERNELS:
        for dtype in configs.DTYPES:
            for config in tune.candidates(kernel, dtype, capability) if candidates else ():
                masked = kernel == "pointer" and dtype == "bfloat16"
                if (kernel, dtype, config, masked) not in seen:
                    yield product_variant(kernel, dtype, config, capability, masked)


def pack_variants(capability):
    integers = ("tokens", "columns", "width", "natural", "token_stride")
    integers += ("plane_stride", "packed_stride")
    for name, element, planes, write, ordered in (
        ("sums", "bf16", 1, False, False),
        ("pack", "bf16", 1, True, True),
        ("planes", "fp32", 3, True, True),
    ):
        types = {
            "x_ptr": f"*{element}",
            "mask_ptr": "*u8",
            "order_ptr": "*i64",
            "packed_ptr": "*bf16",
            "sum_ptr": "*fp64",
            **dict.fromkeys(integers, "i32"),
        }
        constants = {
            "column_stride": 1,
            "HAS_MASK": True,
            "HAS_ORDER": ordered,
            "WRITE": write,
            "PLANES": planes,
            "SUM": True,
            "SPAN": pack.SPAN,
            "STEP": pack.STEP,
            "BLOCK": pack.BLOCK,
        }
        aligned = [name for name in types if name.endswith("_ptr")]
        aligned += [name for name in integers if name != "tokens"]
        row = compile_for(
            pack.pack_kernel, types, constants, capability, aligned, num_warps=pack.WARPS
        )
        yield {"kernel": name, "warps": pack.WARPS, **row}


def cosine_variants(capability):
    """`aligned`: rows start at multiples of 16 elements, as hidden states do."""
    integers = ("tokens", "count", "columns", "x_stride", "y_stride")
    for dtype, element, size in (
        ("bfloat16", "bf16", 2),
        ("float16", "fp16", 2),
        ("float32", "fp32", 4),
    ):
        for valid, aligned in ((False, True), (True, True), (True, False)):
            types = {
                "x_ptr": f"*{element}",
                "y_ptr": f"*{element}",
                "valid_ptr": "*i64" if valid else f"*{element}",
                "out_ptr": "*fp32",
                **dict.fromkeys(integers, "i32"),
            }
            constants = {
                "x_column_stride": 1,
                "y_column_stride": 1,
                "HAS_VALID": valid,
                "FAR": False,
                "ROWS": cosine.ROWS,
                "BLOCK": cosine.PIECE // size,
            }
            multiples = [name for name in types if name.endswith("_ptr")]
            multiples += ["columns", "x_stride", "y_stride"] if aligned else []
            row = compile_for(
                cosine.cosine_kernel, types, constants, capability, multiples, num_warps=cosine.ROWS
            )
            key = {"dtype": dtype, "valid": valid, "aligned": aligned}
            yield {"kernel": "cosine", "warps": cosine.ROWS, **key, **row}


if __name__ == "__main__":
    arch, candidates = int(sys.argv[1]), sys.argv[2:] == ["--candidates"]
    small = (*pack_variants(arch), *cosine_variants(arch))
    for variant in (*small, *product_variants(arch, candidates)):
        print(json.dumps({"arch": arch, **variant}), flush=True)

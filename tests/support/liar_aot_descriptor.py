"""What Triton puts into the wgmma descriptors of `dot(trans(a), b)`; prints one JSON object.

Run as a script in a process of its own, with the columns of `b` and the tokens of a step: `a` has
64 columns for each of two warpgroups. Constants are read from the PTX: shared addresses are not
constant, so what is left are the fields and the steps that are added to them.
"""

from __future__ import annotations

import json
import os
import re
import sys

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROWS = 128


@triton.jit
def product(a_desc, b_desc, out_ptr, tokens, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, j = tl.program_id(0) * M, tl.program_id(1) * N
    total = tl.zeros((M, N), dtype=tl.float32)
    for t in range(0, tokens, K):
        total = tl.dot(tl.trans(a_desc.load([t, i])), b_desc.load([t, j]), total)
    rows, columns = i + tl.arange(0, M), j + tl.arange(0, N)
    tl.store(out_ptr + rows[:, None] * 65536 + columns[None, :], total)


def main(columns: int, depth: int) -> dict:
    signature = {
        "a_desc": f"tensordesc<bf16[{depth}, {ROWS}]>",
        "b_desc": f"tensordesc<bf16[{depth}, {columns}]>",
        "out_ptr": "*fp32",
        "tokens": "i32",
        **dict.fromkeys("MNK", "constexpr"),
    }
    constants = {"M": ROWS, "N": columns, "K": depth}
    kernel = triton.compile(
        ASTSource(fn=product, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 8, "num_stages": 3},
    )
    text = kernel.asm["ptx"]
    # or-ed into both descriptors: swizzle and stride
    (fixed,) = {int(n) for n in re.findall(r"or\.b64\s[^;]*, (\d{10,});", text)}
    # added to the start address of the second one: its leading offset and the step
    start = text.index("wgmma.fence")
    block = text[start : text.index("wgmma.commit_group", start)]
    added = sorted({int(n) for n in re.findall(r"(?:or|add)\.[bs]32\s[^;]*, (\d{7,});", block)})
    right = kernel.metadata.tensordesc_meta[1]
    return {
        "swizzle": fixed >> 62,
        "stride": fixed >> 32 & 0x3FFF,
        "leading": added[0] >> 16 & 0x3FFF,
        "steps": [n & 0xFFFF for n in added],
        "immediates": re.findall(r"wgmma\.mma_async[^;]*, %p\d+, (\d, \d, \d, \d);", text),
        "tensor_map_swizzle": right["swizzle"],
        "box": list(right["block_size"]),
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))

// the packed layout and the register tile that the packer, the kernels and the driver agree on
#pragma once
#include <cstdint>

namespace liar {

// the packed form of X is a list of panels of kPanel columns; a panel is a list of steps, and a
// step holds one 32-bit element per column: an fp32 value (one token), or a bf16 pair (two tokens).
// both operands of xᵀx read the same packed copy: rows of G as slivers of kSliver columns that are
// broadcast, columns of G as whole panels of three 512-bit registers.
constexpr int kPanel = 48;
constexpr int kSliver = 8;  // 8 x 3 accumulators + 3 operands + 1 broadcast = 28 of 32 registers
constexpr int kSlivers = kPanel / kSliver;

// steps per visit of a tile. measured on one Zen 5 core at n = 4096, GFLOP/s of n²T: 64 steps 186
// (fp32) and 370 (bf16), 128: 201 and 400, 256: 211 and 419; the kernel alone does 236 and 470
constexpr int64_t kDepth = 256;

// c[kSliver][kPanel] = or += Σ_k a[k][0..kSliver) b[k][0..kPanel); a and b step by kPanel elements.
// the sum over k starts at zero even when it is added: rounding errors then grow with the number of
// visits plus the steps of one, not with their product
using MicroKernel = void (*)(int64_t steps, const float* a, const float* b, float* c, bool fresh);

void micro_generic(int64_t steps, const float* a, const float* b, float* c, bool fresh);
void micro_avx512(int64_t steps, const float* a, const float* b, float* c, bool fresh);
void micro_avx512_bf16(int64_t steps, const float* a, const float* b, float* c, bool fresh);

bool cpu_has_avx512();
bool cpu_has_avx512_bf16();
bool cpu_has_amx_bf16();

}  // namespace liar

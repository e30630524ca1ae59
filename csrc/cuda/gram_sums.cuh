// the sums of the Hopper Gram kernel: kept accurate in registers, added to G, or to a workspace and
// from there to G.
//
// Long sums: a tensor core drops the low bits of products that it aligns to its running sum, and
// truncates the sum: an error of one sign where all products are positive, as on the diagonal. By a
// published model of the H100 (arXiv 2512.07004), and as measured on an H200, 384 tokens of
// bfloat16 lose 7e-7 of the sum and 192 of float16 as much. So every 384 or 192 tokens the sum
// moves into a second accumulator by additions that round to nearest. There is
// no room for a second float per element: 64 × 256 of a warpgroup are 128 registers a thread, and
// 256 is more than a thread can have (128 × 192 tiles would fit two floats, and read a tenth more
// of x for each multiplication). The second accumulator is a bfloat16, two to a register:
//     t = high + low;  high' = bfloat16(t);  low' = low + (high - high')
// high - high' is exact, or rounded to nearest where high changed by orders of magnitude, and high
// and low together are worth 32 bits. low' lies within ±2⁻⁹ of the sum, with either sign, and the
// tensor core goes on from there. 128 + 64 registers, 11 instructions for two elements each
// time; the two warpgroups do it half a period apart, so that the tensor cores always have work
// from one of them.
// A sum that overflows ends as NaN.
#pragma once
#include "gram_shape.cuh"

namespace liar::gram {
namespace {

#if defined(LIAR_HOPPER_CODE)

// moves the sum into `high`, as above
template <int kCount>
__device__ __forceinline__ void promote(float (&low)[kCount], uint32_t (&high)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float2 old = hopper::unpack<Element::bf16>(high[i]);
    high[i] = hopper::pack_bf16(low[2 * i] + old.x, low[2 * i + 1] + old.y);
    const float2 now = hopper::unpack<Element::bf16>(high[i]);
    low[2 * i] += old.x - now.x;
    low[2 * i + 1] += old.y - now.y;
  }
}

// where in the tile a thread's accumulators lie: hopper::wgmma says how
struct Fragment {
  int row, column;
  __device__ __forceinline__ explicit Fragment(int thread)
      : row(thread / kWarpgroup * 64 + thread % kWarpgroup / 32 * 16 + thread % 32 / 4),
        column(thread % 4 * 2) {}
};

// entries (row, column), (row, column + 1) of G, where they exist on or below the diagonal
__device__ __forceinline__ void add_pair(const Parameters& p, int row, int column, float first,
                                         float second) {
  if (row >= p.columns) return;
  float* const to = p.gram + row * p.gram_stride + column;
  if (column < p.panel && column <= row) hopper::add(to, first);
  if (column + 1 < p.panel && column + 1 <= row) hopper::add(to + 1, second);
}

// the values of accumulators i to i + 3: a pair in one row, and the pair 8 rows below
template <int kCount>
__device__ __forceinline__ float4 whole(const float (&low)[kCount],
                                        const uint32_t (&high)[kCount / 2], int i) {
  const float2 a = hopper::unpack<Element::bf16>(high[i / 2]);
  const float2 b = hopper::unpack<Element::bf16>(high[i / 2 + 1]);
  return make_float4(low[i] + a.x, low[i + 1] + a.y, low[i + 2] + b.x, low[i + 3] + b.y);
}

template <int kCount>
__device__ __forceinline__ void store_tile(const Parameters& p, const Work& work, int thread,
                                           const float (&low)[kCount],
                                           const uint32_t (&high)[kCount / 2]) {
  constexpr int kTileColumns = 2 * kCount;
  if (work.slot >= 0) {
    float* const to = p.partial + (int64_t(work.slot) * kMultiplyThreads * kCount + 4 * thread);
#pragma unroll
    for (int i = 0; i < kCount; i += 4)
      *reinterpret_cast<float4*>(to + i * kMultiplyThreads) = whole(low, high, i);
    return;
  }
  const Fragment at(thread);
  const int row = work.tile.row * kTileRows + at.row;
  const int column = work.tile.column * kTileColumns + at.column;
  const int last_column = (work.tile.column + 1) * kTileColumns - 1;
  const bool inside = p.paired && (work.tile.row + 1) * kTileRows <= p.columns &&
                      last_column < p.panel && last_column <= work.tile.row * kTileRows;
  if (inside) {
    float* const top = p.gram + row * p.gram_stride + column;
    float* const bottom = top + 8 * p.gram_stride;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 value = whole(low, high, i);
      hopper::add(top + 2 * i, value.x, value.y);
      hopper::add(bottom + 2 * i, value.z, value.w);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 value = whole(low, high, i);
      add_pair(p, row, column + 2 * i, value.x, value.y);
      add_pair(p, row + 8, column + 2 * i, value.z, value.w);
    }
  }
}

#endif

// adds the parts of the split tiles to G, first part first; one block per tile of a block and 4
// accumulators
template <int kTileColumns>
__global__ void __launch_bounds__(kMultiplyThreads) add_parts_kernel(const Parameters p) {
#if defined(LIAR_HOPPER_CODE)
  constexpr int kCount = Shape<kTileColumns, 1>::kAccumulators;
  const int thread = threadIdx.x, i = 4 * blockIdx.x, slot = blockIdx.y;
  const int slots = p.plan.rest * p.cluster;  // of one part
  Tile tile = tile_at(p.plan, p.plan.whole + slot / p.cluster);
  tile.row = tile.row * p.cluster + slot % p.cluster;
  const float* from =
      p.partial + int64_t(slot) * kMultiplyThreads * kCount + i * kMultiplyThreads + 4 * thread;
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int part = 0; part < p.plan.parts; ++part) {
    const float4 more = *reinterpret_cast<const float4*>(from);
    total = make_float4(total.x + more.x, total.y + more.y, total.z + more.z, total.w + more.w);
    from += int64_t(slots) * kMultiplyThreads * kCount;
  }
  const Fragment at(thread);
  const int row = tile.row * kTileRows + at.row;
  const int column = tile.column * kTileColumns + at.column + 2 * i;
  add_pair(p, row, column, total.x, total.y);
  add_pair(p, row + 8, column, total.z, total.w);
  const int feature = tile.row * kTileRows + thread;
  if (i > 0 || tile.column > 0 || p.sum == nullptr || thread >= kTileRows || feature >= p.columns)
    return;
  double sum = 0.0;
  for (int part = 0; part < p.plan.parts; ++part)
    sum += p.partial_sum[(int64_t(part) * slots + slot) * kTileRows + thread];
  p.sum[feature] += sum;
#endif
}

}  // namespace
}  // namespace liar::gram

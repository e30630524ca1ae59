// Cholesky factorisation of one matrix of up to 128 rows by one thread block, in shared memory, and
// substitution with its factor.
//
// The diagonal blocks are replaced by the inverses of their triangular factors: whatever follows a
// diagonal block, the panel below it and both substitutions, is then a product (tile.cuh) instead
// of a chain of 32 dependent steps.
#pragma once
#include <stdint.h>

#include "tile.cuh"

namespace liar {

// what a factorisation says about itself; in shared memory, written by warp 0
struct Pivots {
  int info;         // 1 + index of the first pivot that is not positive, or 0
  double smallest;  // smallest pivot, or the one that `info` names
};

template <typename Real>
struct Vector;
template <>
struct Vector<double> {
  static constexpr int kWidth = 2;
  using Type = double2;
};
template <>
struct Vector<float> {
  static constexpr int kWidth = 4;
  using Type = float4;
};

__device__ __forceinline__ double reciprocal_root(double x) { return rsqrt(x); }
__device__ __forceinline__ float reciprocal_root(float x) { return rsqrtf(x); }

// one warp: the block, stored whole, becomes the inverse of its Cholesky factor, which goes to
// `out` when wanted. lane r holds row r of the matrix and column r of the inverse: both are updated
// by the column of L that one broadcast through shared memory brings, so the inverse costs no
// latency of its own. `index` is the row of the whole matrix that the block starts at, rows ≥
// `size` are padding.
template <typename Real>
__device__ __forceinline__ void factor_block(Real* block, Real* column, int index, int size,
                                             Pivots* pivots, Real* out, int64_t out_row) {
  using Wide = Vector<Real>;
  constexpr int kWidth = Wide::kWidth;
  const int lane = threadIdx.x % 32;
  Real row[kBlock], inverse[kBlock];
#pragma unroll
  for (int c = 0; c < kBlock; ++c) {
    // by symmetry, without bank conflicts; the lane also writes this column and no other
    row[c] = block[c * kPitch + lane];
    inverse[c] = c == lane ? Real(1) : Real(0);
  }
  int failed = pivots->info;
  Real smallest = Real(pivots->smallest);
#pragma unroll
  for (int j = 0; j < kBlock; ++j) {
    const Real pivot = __shfl_sync(~0u, row[j], j);
    const bool usable = pivot > Real(0);
    if (index + j < size && !failed) {
      if (!usable) failed = index + j + 1;
      if (!usable || pivot < smallest) smallest = pivot;
    }
    // NaN from here on: nothing that depends on this column can be mistaken for a result
    const Real root = usable ? reciprocal_root(pivot) : Real(NAN);
    row[j] *= root;
    inverse[j] *= root;
    block[j * kPitch + lane] = inverse[j];
    if (out != nullptr && j <= lane && index + lane < size) out[lane * out_row + j] = row[j];
    // two buffers: a lane may write the next column while another still reads this one
    Real* const shared = column + (j % 2) * kBlock;
    shared[lane] = row[j];
    __syncwarp();
#pragma unroll
    for (int start = (j + 1) / kWidth * kWidth; start < kBlock; start += kWidth) {
      const auto wide = *reinterpret_cast<const typename Wide::Type*>(shared + start);
      const Real* const factor = reinterpret_cast<const Real*>(&wide);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const int c = start + e;
        if (c <= j) continue;
        row[c] -= row[j] * factor[e];
        inverse[c] -= inverse[j] * factor[e];
      }
    }
  }
  if (lane == 0) pivots->info = failed, pivots->smallest = double(smallest);
}

// A(i, j) -= L(i, k) L(j, k)ᵀ, strip `part` of 4
template <typename Real>
__device__ __forceinline__ void update_block(Blocks<Real> a, int i, int j, int k, int part) {
  Strip<Real> product[1];
  multiply<kPitch, 1, 1, kPitch>(product, a.at(i, k), a.at(j, k) + 8 * part * kPitch);
  Real* const target = a.at(i, j) + 8 * part;
  product[0].each([&](int row, int column, Real& v) { target[row * kPitch + column] -= v; });
}

// L(i, k) = A(i, k) L(k, k)⁻ᵀ, rows 8 part to 8 part + 7: a warp reads all it overwrites
template <typename Real>
__device__ __forceinline__ void solve_below(Blocks<Real> a, int i, int k, int part) {
  Real* const rows = a.at(i, k) + 8 * part * kPitch;
  Strip<Real> transposed[1];
  multiply<kPitch, 1, 1, kPitch>(transposed, a.at(k, k), rows);
  __syncwarp();
  transposed[0].each([&](int column, int row, Real& v) { rows[row * kPitch + column] = v; });
}

// the whole thread block, A complete and visible to it; `column` is scratch for 64 numbers. With
// `out` the lower triangle of L goes there, row stride `out_row`. Ends with a barrier.
template <typename Real, int kWarps>
__device__ __forceinline__ void factor(Blocks<Real> a, int blocks, int size, Real* column,
                                       Pivots* pivots, Real* out, int64_t out_row) {
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) pivots->info = 0, pivots->smallest = INFINITY;
  __syncwarp();
  for (int k = 0; k < blocks; ++k) {
    if (warp == 0) {
      // warp 0 runs ahead: it factors the next diagonal block while the others update the rest
      if (k > 0) {
        for (int part = 0; part < 4; ++part) update_block(a, k, k, k - 1, part);
        __syncwarp();
      }
      factor_block(a.at(k, k), column, kBlock * k, size, pivots,
                   out == nullptr ? nullptr : out + kBlock * k * (out_row + 1), out_row);
    } else if (k > 0) {
      int unit = 0;
      for (int i = k + 1; i < blocks; ++i)
        for (int j = k; j <= i; ++j)
          for (int part = 0; part < 4; ++part)
            if (unit++ % (kWarps - 1) == warp - 1) update_block(a, i, j, k - 1, part);
    }
    __syncthreads();
    for (int unit = warp; unit < 4 * (blocks - 1 - k); unit += kWarps)
      solve_below(a, k + 1 + unit / 4, k, unit % 4);
    __syncthreads();
  }
  if (out == nullptr) return;
  for (int i = 1; i < blocks; ++i)
    for (int j = 0; j < i; ++j)
      for (int at = threadIdx.x; at < kBlock * kBlock; at += 32 * kWarps) {
        const int row = kBlock * i + at / kBlock, col = kBlock * j + at % kBlock;
        if (row < size) out[row * out_row + col] = a.at(i, j)[at / kBlock * kPitch + at % kBlock];
      }
}

// one warp's share of a tile of columns: kCount strips of 8, `step` columns apart
template <typename Real, int kCount, int kTilePitch>
struct Columns {
  Real* data;
  int step;

  template <typename F>
  __device__ __forceinline__ void each(Strip<Real> (&strips)[kCount], int block, F f) const {
    Real* const x = data + kBlock * block * kTilePitch;
#pragma unroll
    for (int n = 0; n < kCount; ++n)
      strips[n].each(
          [&](int row, int column, Real& v) { f(x[row * kTilePitch + column + n * step], v); });
  }

  // sum += A x_k, A at a[row * kARow + k * kAK]
  template <int kARow, int kAK>
  __device__ __forceinline__ void add_product(Strip<Real> (&sum)[kCount], const Real* a,
                                              int k) const {
    multiply<kARow, kAK, kTilePitch, 1>(sum, a, data + kBlock * k * kTilePitch, step);
  }

  // x_i -= sum
  __device__ __forceinline__ void subtract(Strip<Real> (&sum)[kCount], int i) const {
    each(sum, i, [](Real& x, Real& v) { x -= v; });
    __syncwarp();
  }

  // x_i = M x_i, M at inverse[row * kRow + k * kK]
  template <int kRow, int kK>
  __device__ __forceinline__ void apply(const Real* inverse, int i) const {
    Strip<Real> solved[kCount];
    add_product<kRow, kK>(solved, inverse, i);
    __syncwarp();
    each(solved, i, [](Real& x, Real& v) { x = v; });
    __syncwarp();
  }

  // x = L⁻¹ x, for x whose rows above block `first` are zero
  __device__ __forceinline__ void forward(Blocks<Real> l, int blocks, int first = 0) const {
    apply<kPitch, 1>(l.at(first, first), first);
    for (int i = first + 1; i < blocks; ++i) {
      Strip<Real> sum[kCount];
      for (int k = first; k < i; ++k) add_product<kPitch, 1>(sum, l.at(i, k), k);
      subtract(sum, i);
      apply<kPitch, 1>(l.at(i, i), i);
    }
  }

  // x = L⁻ᵀ x
  __device__ __forceinline__ void backward(Blocks<Real> l, int blocks) const {
    apply<1, kPitch>(l.at(blocks - 1, blocks - 1), blocks - 1);
    for (int i = blocks - 2; i >= 0; --i) {
      Strip<Real> sum[kCount];
      for (int k = i + 1; k < blocks; ++k) add_product<1, kPitch>(sum, l.at(k, i), k);
      subtract(sum, i);
      apply<1, kPitch>(l.at(i, i), i);
    }
  }
};

}  // namespace liar

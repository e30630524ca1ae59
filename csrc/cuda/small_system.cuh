// the parts of a small ridge solve (solve_small.cu): how a block's shared memory is laid out, how
// the scaled system gets there, and what is estimated and checked about it
#pragma once
#include "../liar.h"
#include "cholesky.cuh"

namespace liar {

constexpr int kPowerSteps = 4;    // on Ã: 8 vectors
constexpr int kInverseSteps = 3;  // on Ã⁻¹: 8 vectors for each probing warp
// these estimate the smallest eigenvalue while the others already substitute; more of them would
// share the tensor cores and take longer
constexpr int kProbeWarps = 2;
constexpr int kPartials = 3;  // ‖R‖², ‖Z̃‖², ‖B̃‖² of a tile

// what the threads of a block tell each other
struct Shared {
  Pivots pivots;
  double largest;                // eigenvalue of Ã
  double growth[kProbeWarps];    // eigenvalue of Ã⁻¹, each from below
  double partial[8][kPartials];  // a warp each
  double total[kPartials];
};

// where everything lies in the dynamic shared memory of a block
template <typename Real, int kStrips, int kWarps>
struct Layout {
  static constexpr bool kSingle = sizeof(Real) == 4;
  static constexpr int kTilePitch = kStrips * kStripColumns + 4;
  static constexpr int kOwn = kStrips / kWarps;  // strips of a warp: w, w + kWarps, ...
  static constexpr int kStep = kWarps * kStripColumns;
  using Share = Columns<Real, kOwn, kTilePitch>;

  // bytes of a system of `blocks` blocks, and with `memory` the pointers into it
  static __host__ __device__ size_t bytes(int blocks) {
    const int rows = kBlock * blocks;
    return sizeof(Shared) + sizeof(double) * (rows + kBlockElements) +
           sizeof(Real) * (Blocks<Real>::count(blocks) * kBlockElements + rows * kTilePitch) +
           (kSingle ? sizeof(double) * rows * kTilePitch : 0);
  }

  Shared* shared;
  double* stage;  // (32, 32) block of Ã in double; scratch before
  double* scale;  // d, zero for dead and padding rows
  double* exact;  // (rows, tile) the solution in double: `tile` itself where Real is double
  Blocks<Real> a;
  Real* tile;  // (rows, tile) right-hand side, then solution

  __device__ Layout(unsigned char* memory, int blocks) {
    const int rows = kBlock * blocks;
    stage = reinterpret_cast<double*>(memory);
    scale = stage + kBlockElements;
    a.data = reinterpret_cast<Real*>(scale + rows);
    tile = a.data + Blocks<Real>::count(blocks) * kBlockElements;
    double* const end = reinterpret_cast<double*>(tile + rows * kTilePitch);
    exact = kSingle ? end : reinterpret_cast<double*>(tile);
    shared = reinterpret_cast<Shared*>(end + (kSingle ? rows * kTilePitch : 0));
  }

  // the columns of the tile that belong to this warp
  __device__ __forceinline__ Share share() const {
    return {tile + threadIdx.x / 32 * kStripColumns, kStep};
  }

  // the elements of them that a lane looks after: column lane % 8 of a strip, rows lane / 8 + 4 m

  // tile = f(row, column), and exact = 0 where it is another
  template <typename F>
  __device__ __forceinline__ void fill(int blocks, F f) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const int column = threadIdx.x / 32 * kStripColumns + n * kStep + lane % 8;
      for (int first = lane / 8; first < kBlock * blocks; first += kBlock) {
        // all loads before the first store: the compiler would wait for each in turn
        double value[8];
#pragma unroll
        for (int m = 0; m < 8; ++m) value[m] = f(first + 4 * m, column);
#pragma unroll
        for (int m = 0; m < 8; ++m) {
          const int place = (first + 4 * m) * kTilePitch + column;
          tile[place] = Real(value[m]);
          if (kSingle) exact[place] = 0;
        }
      }
    }
    __syncwarp();
  }

  // exact += tile where they differ
  __device__ __forceinline__ void add_correction(int blocks) const {
    if (!kSingle) return;
    const int lane = threadIdx.x % 32;
    for (int n = 0; n < kOwn; ++n)
      for (int row = lane / 8; row < kBlock * blocks; row += 4) {
        const int column = threadIdx.x / 32 * kStripColumns + n * kStep + lane % 8;
        exact[row * kTilePitch + column] += double(tile[row * kTilePitch + column]);
      }
  }

  // smallest eigenvalue of Ã, from above
  __device__ __forceinline__ double smallest() const {
    double growth = shared->growth[0];
    for (int w = 1; w < kProbeWarps; ++w) growth = larger(growth, shared->growth[w]);
    return 1 / growth;
  }
};

// one block of Ã on its way from global to shared memory, each thread's part in registers: the
// loads can be under way while something else is computed
template <int kThreads>
struct ScaledBlock {
  static constexpr int kEach = kBlock * kBlock / kThreads;
  double value[kEach];

  // block (i, j), i ≥ j, of A: the lower triangle, zero beyond it
  __device__ __forceinline__ void load(const double* matrix, int64_t row_stride, int size, int i,
                                       int j) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int at = threadIdx.x + e * kThreads;
      const int row = kBlock * i + at / kBlock, column = kBlock * j + at % kBlock;
      value[e] = row < size && column <= row ? matrix[row * row_stride + column] : 0;
    }
  }

  // scaled; diagonal blocks are stored whole
  template <typename Real>
  __device__ __forceinline__ void store(Real* block, const double* scale, int i, int j) const {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int at = threadIdx.x + e * kThreads, row = at / kBlock, column = at % kBlock;
      if (i == j && row < column) continue;
      const double left = scale[kBlock * i + row], right = scale[kBlock * j + column];
      double scaled = left * value[e] * right;
      if (left == 0 || right == 0) scaled = 0;  // whatever a dead row holds
      if (i == j && row == column) scaled = isnan(left) ? left : 1;
      block[row * kPitch + column] = Real(scaled);
      if (i == j) block[column * kPitch + row] = Real(scaled);
    }
  }
};

// the whole block: d, and Ã in at.a; ends with a barrier
template <typename Real, int kStrips, int kWarps>
__device__ __forceinline__ void load_system(const Layout<Real, kStrips, kWarps>& at, int blocks,
                                            int size, const double* matrix, int64_t row_stride,
                                            double strength) {
  constexpr int kThreads = 32 * kWarps;
  // several blocks at a time: one after the other, each would wait for the memory
  constexpr int kBatch = 24 / ScaledBlock<kThreads>::kEach;
  const int count = Blocks<Real>::count(blocks);
  int i = 0, j = 0, si = 0, sj = 0;
  for (int start = 0; start < count; start += kBatch) {
    ScaledBlock<kThreads> batch[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (start + n < count) batch[n].load(matrix, row_stride, size, i, j);
      if (++j > i) ++i, j = 0;
    }
    if (start == 0) {
#pragma unroll 1
      for (int row = threadIdx.x; row < kBlock * blocks; row += kThreads) {
        const double own = row < size ? matrix[row * (row_stride + 1)] : 0, sum = own + strength;
        // NaN is not dead: it has to reach the factorisation
        at.scale[row] = own == 0 ? 0 : sum > 0 && isfinite(sum) ? 1 / sqrt(sum) : double(NAN);
      }
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (start + n < count) batch[n].store(at.a.at(si, sj), at.scale, si, sj);
      if (++sj > si) ++si, sj = 0;
    }
  }
  __syncthreads();
}

// a number in [-1, 1) that depends on nothing but its place: the same input gives the same estimate
__device__ __forceinline__ float probe(int row, int column) {
  uint32_t hash = uint32_t(row) * 0x9E3779B1u ^ uint32_t(column + 1) * 0x85EBCA77u;
  hash = (hash ^ hash >> 15) * 0x2C1B3C6Du;
  hash = (hash ^ hash >> 12) * 0x297A2D39u;
  return float(int32_t(hash ^ hash >> 15)) * 0x1p-31f;
}

// shared->largest: the largest eigenvalue of Ã by power iteration, from below; a step grows by at
// most the number of rows, so nothing has to be scaled
template <typename Real, int kStrips, int kWarps>
__device__ __forceinline__ void estimate_largest(const Layout<Real, kStrips, kWarps>& at,
                                                 int blocks, int size) {
  constexpr int kTilePitch = Layout<Real, kStrips, kWarps>::kTilePitch;
  const int warp = threadIdx.x / 32, rows = kBlock * blocks;
  for (int i = threadIdx.x; i < rows * kStripColumns; i += 32 * kWarps) {
    const int row = i / kStripColumns, column = i % kStripColumns;
    at.tile[row * kTilePitch + column] = row < size ? Real(probe(row, column)) : Real(0);
  }
  __syncthreads();
  for (int step = 0; step < kPowerSteps; ++step) {
    const Real* const from = at.tile + step % 2 * kStripColumns;
    Real* const to = at.tile + (step + 1) % 2 * kStripColumns;
    for (int i = warp; i < blocks; i += kWarps) {
      Strip<Real> sum[1];
      for (int j = 0; j < blocks; ++j) {
        const Real* const x = from + kBlock * j * kTilePitch;
        if (j <= i)
          multiply<kPitch, 1, kTilePitch, 1>(sum, at.a.at(i, j), x);
        else
          multiply<1, kPitch, kTilePitch, 1>(sum, at.a.at(j, i), x);
      }
      sum[0].each(
          [&](int row, int column, Real& v) { to[(kBlock * i + row) * kTilePitch + column] = v; });
    }
    __syncthreads();
  }
  if (warp == 0) {
    const Real* const last = at.tile + kPowerSteps % 2 * kStripColumns;
    const Real* const before = at.tile + (kPowerSteps - 1) % 2 * kStripColumns;
    const auto norm2 = [&](const Real* x) {
      return column_sum(rows, [&](int row, int column) {
        const double v = double(x[row * kTilePitch + column]);
        return v * v;
      });
    };
    const double after = norm2(last), reference = norm2(before);
    const double growth = warp_max(sqrt(after / reference));
    if (threadIdx.x == 0) at.shared->largest = growth;
  }
}

// one warp: shared->growth: the largest eigenvalue of Ã⁻¹ by power iteration, from below, in the
// warp's first strip of the tile
template <typename Real, int kStrips, int kWarps>
__device__ __forceinline__ void estimate_inverse(const Layout<Real, kStrips, kWarps>& at,
                                                 int blocks, int size) {
  constexpr int kTilePitch = Layout<Real, kStrips, kWarps>::kTilePitch;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = kBlock * blocks;
  const Columns<Real, 1, kTilePitch> probes{at.tile + warp * kStripColumns, 0};
  // f(row, x&) for the elements of column lane % 8 that this lane looks after, in norm() too
  const auto each = [&](auto f) {
    for (int row = lane / 8; row < rows; row += 4) f(row, probes.data[row * kTilePitch + lane % 8]);
  };
  const auto norm = [&] {
    return sqrt(column_sum(rows, [&](int row, int column) {
      const double v = double(probes.data[row * kTilePitch + column]);
      return v * v;
    }));
  };
  each([&](int row, Real& x) {
    x = row < size ? Real(probe(row, warp * kStripColumns + lane % 8)) : Real(0);
  });
  for (int step = 0; step < kInverseSteps; ++step) {
    const Real shrink = Real(1 / norm());
    each([&](int, Real& x) { x *= shrink; });
    __syncwarp();
    probes.forward(at.a, blocks);
    probes.backward(at.a, blocks);
  }
  const double growth = warp_max(norm());
  if (lane == 0) at.shared->growth[warp] = growth;
}

// the tile's columns of B̃, zero beyond B and in dead rows
struct Right {
  const double* data;
  int64_t row_stride, columns;
  const double* scale;

  __device__ __forceinline__ double at(int row, int64_t column) const {
    const double d = scale[row];
    return d == 0 || column >= columns ? 0 : d * data[row * row_stride + column];
  }
};

// R = B̃ - Ã Z̃ for the tile; squared norms of R, Z̃ and B̃ in shared->total. Where Real is float, R
// replaces the tile: it is the next right-hand side.
template <typename Real, int kStrips, int kWarps>
__device__ __forceinline__ void residual(const Layout<Real, kStrips, kWarps>& at, int blocks,
                                         int size, const double* matrix, int64_t matrix_row,
                                         const Right& right, int64_t first_column) {
  using At = Layout<Real, kStrips, kWarps>;
  constexpr int kTilePitch = At::kTilePitch;
  constexpr int kOwn = At::kOwn;
  constexpr int kStep = At::kStep;
  const int warp = threadIdx.x / 32;
  double sums[kPartials] = {};
  ScaledBlock<32 * kWarps> next;
  next.load(matrix, matrix_row, size, 0, 0);
  for (int i = 0; i < blocks; ++i) {
    Strip<double> product[kOwn], target[kOwn];
    const int first_row = kBlock * i, own_column = warp * kStripColumns;
    each_element(target, [&](int n, int r, int c, double& b) {
      b = right.at(first_row + r, first_column + own_column + n * kStep + c);
    });
    for (int j = 0; j < blocks; ++j) {
      next.store(at.stage, at.scale, i > j ? i : j, i > j ? j : i);
      __syncthreads();
      // the loads of the next block run under the product of this one
      const bool wrap = j + 1 == blocks;
      const int ni = wrap ? i + 1 : i, nj = wrap ? 0 : j + 1;
      if (ni < blocks) next.load(matrix, matrix_row, size, ni > nj ? ni : nj, ni > nj ? nj : ni);
      const double* const x = at.exact + kBlock * j * kTilePitch + warp * kStripColumns;
      if (j > i)
        multiply<1, kPitch, kTilePitch, 1>(product, at.stage, x, kStep);
      else
        multiply<kPitch, 1, kTilePitch, 1>(product, at.stage, x, kStep);
      __syncthreads();
    }
    each_element(target, [&](int n, int r, int c, double& b) {
      const int place = (first_row + r) * kTilePitch + own_column + n * kStep + c;
      const double z = at.exact[place];
      sums[1] += z * z;
      sums[2] += b * b;
    });
#pragma unroll
    for (int n = 0; n < kOwn; ++n) target[n] -= product[n];
    each_element(target, [&](int n, int r, int c, double& error) {
      sums[0] += error * error;
      if (At::kSingle)
        at.tile[(first_row + r) * kTilePitch + own_column + n * kStep + c] = Real(error);
    });
  }
#pragma unroll
  for (int n = 0; n < kPartials; ++n) {
    sums[n] = warp_sum(sums[n]);
    if (threadIdx.x % 32 == 0) at.shared->partial[warp][n] = sums[n];
  }
  __syncthreads();
  if (threadIdx.x < kPartials) {
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += at.shared->partial[w][threadIdx.x];
    at.shared->total[threadIdx.x] = total;
  }
  __syncthreads();
}

// a residual relative to what it is the difference of
__device__ __forceinline__ double relative(double r2, double z2, double b2, double norm) {
  const double size = norm * sqrt(z2) + sqrt(b2);
  return size == 0 ? 0 : sqrt(r2) / size;
}

}  // namespace liar

// the diagonal block of a blocked Cholesky factorisation: one thread block per matrix factors it in
// shared memory, writes the factor back and its inverse beside it, so that the rest of the
// factorisation and both substitutions are library products
#include "../liar.h"
#include "cholesky.cuh"

namespace liar {
namespace {

constexpr int kMaximum = 128, kWarps = 8;  // a warp has one strip of the tile, or none

// columns of the inverse that are made at a time; half as many where shared memory is short
template <typename Real, int kStrips>
struct PanelLayout {
  static constexpr int kTilePitch = kStrips * kStripColumns + 4;

  static __host__ __device__ size_t bytes(int blocks) {
    return sizeof(Pivots) +
           sizeof(Real) * (2 * kBlock + Blocks<Real>::count(blocks) * kBlockElements +
                           kBlock * blocks * kTilePitch);
  }
};

template <typename Real, int kStrips>
__global__ void __launch_bounds__(32 * kWarps, LIAR_RESIDENT) panel(const LiarPanel args) {
  constexpr int kThreads = 32 * kWarps, kTileColumns = kStrips * kStripColumns;
  constexpr int kTilePitch = PanelLayout<Real, kStrips>::kTilePitch;
  LIAR_DYNAMIC_SHARED(memory);
  const int size = args.size, blocks = (size + kBlock - 1) / kBlock, rows = kBlock * blocks;
  Real* const column = reinterpret_cast<Real*>(memory);
  const Blocks<Real> a{column + 2 * kBlock};
  Real* const tile = a.data + Blocks<Real>::count(blocks) * kBlockElements;
  Pivots* const pivots = reinterpret_cast<Pivots*>(tile + rows * kTilePitch);
  const int64_t system = blockIdx.x;
  Real* const matrix = static_cast<Real*>(args.matrix) + system * args.matrix_batch;
  Real* const inverse = static_cast<Real*>(args.inverse) + system * args.inverse_batch;

  for (int i = 0; i < blocks; ++i)
    for (int j = 0; j <= i; ++j)
      for (int e = threadIdx.x; e < kBlock * kBlock; e += kThreads) {
        // diagonal blocks are stored whole
        const int first = kBlock * i + e / kBlock, second = kBlock * j + e % kBlock;
        const int row = max(first, second), col = min(first, second);
        Real value = row == col ? Real(1) : Real(0);
        if (row < size) value = matrix[row * args.matrix_row + col];
        a.at(i, j)[e / kBlock * kPitch + e % kBlock] = value;
      }
  __syncthreads();
  factor<Real, kWarps>(a, blocks, size, column, pivots, matrix, args.matrix_row);

  for (int start = 0; start < size; start += kTileColumns) {
    // a thread fills the elements that it wrote out of the last tile, so no barrier between the two
    for (int e = threadIdx.x; e < rows * kTileColumns; e += kThreads) {
      const int row = e / kTileColumns, col = e % kTileColumns;
      tile[row * kTilePitch + col] = row == start + col ? Real(1) : Real(0);
    }
    __syncthreads();
    const int warp = threadIdx.x / 32;
    if (warp < kStrips)
      Columns<Real, 1, kTilePitch>{tile + warp * kStripColumns, 0}.forward(a, blocks,
                                                                           start / kBlock);
    __syncthreads();
    for (int e = threadIdx.x; e < size * kTileColumns; e += kThreads) {
      const int row = e / kTileColumns, col = e % kTileColumns;
      // a failed factor is NaN above the diagonal too; there the inverse is zero all the same
      if (start + col < size)
        inverse[row * args.inverse_row + start + col] =
            start + col > row ? Real(0) : tile[row * kTilePitch + col];
    }
  }
  if (threadIdx.x == 0 && args.info[system] == 0) {
    if (pivots->info != 0) {
      args.info[system] = int32_t(args.first) + pivots->info;
      args.pivot[system] = pivots->smallest;
    } else if (pivots->smallest < args.pivot[system]) {
      args.pivot[system] = pivots->smallest;
    }
  }
}

template <typename Real, int kStrips>
cudaError_t launch(const LiarPanel& args, size_t bytes) {
  return liar_launch(panel<Real, kStrips>, dim3(unsigned(args.batch)), dim3(32 * kWarps), bytes,
                     args.stream, args);
}

}  // namespace
}  // namespace liar

extern "C" int64_t liar_solve_panel_shared(int32_t single) {
  constexpr int kBlocks = liar::kMaximum / liar::kBlock;
  return int64_t(single ? liar::PanelLayout<float, 8>::bytes(kBlocks)
                        : liar::PanelLayout<double, 4>::bytes(kBlocks));
}

extern "C" int liar_solve_panel(const LiarPanel* args) {
  using namespace liar;
  if (args->batch == 0) return cudaSuccess;
  if (args->size < 1 || args->size > kMaximum || args->batch >= (int64_t(1) << 31))
    return cudaErrorInvalidValue;
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return int(error);
  const int blocks = (args->size + kBlock - 1) / kBlock;
  const size_t wide =
      args->single ? PanelLayout<float, 8>::bytes(blocks) : PanelLayout<double, 8>::bytes(blocks);
  if (wide <= size_t(limit))
    return int(args->single ? launch<float, 8>(*args, wide) : launch<double, 8>(*args, wide));
  const size_t narrow = PanelLayout<double, 4>::bytes(blocks);
  if (args->single || narrow > size_t(limit)) return cudaErrorInvalidConfiguration;
  return int(launch<double, 4>(*args, narrow));
}

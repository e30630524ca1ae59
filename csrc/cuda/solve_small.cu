// batched ridge solve for systems of up to 128 rows: one thread block per system (and per share of
// its right-hand sides), everything in shared memory, one pass over global memory for the factor
// and one for the residual. liar.h has the definition.
#include "small_system.cuh"

namespace liar {
namespace {

constexpr int kMaximum = 128;
constexpr int kRefinements = 5;
// refinement stops at this relative residual, and at this bound of the forward error: the residual
// times the condition
constexpr double kAccepted = 1e-10, kForward = 1e-8;

template <typename Real, int kStrips, int kWarps>
__device__ __forceinline__ void solve_system(const LiarSolveSmall& args) {
  using At = Layout<Real, kStrips, kWarps>;
  constexpr int kThreads = 32 * kWarps, kTilePitch = At::kTilePitch;
  constexpr int kTileColumns = kStrips * kStripColumns;
  LIAR_DYNAMIC_SHARED(memory);
  const int size = args.size, blocks = (size + kBlock - 1) / kBlock;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const At at(memory, blocks);
  const int64_t system = blockIdx.x;
  const double* const matrix = args.matrix + system * args.matrix_batch;
  load_system(at, blocks, size, matrix, args.matrix_row, args.strength[system]);
  const bool first = blockIdx.y == 0;
  // refinement stops by the residual and the condition, so there every block needs them
  const bool diagnosed = first || At::kSingle;
  if (diagnosed) estimate_largest(at, blocks, size);
  factor<Real, kWarps>(at.a, blocks, size, reinterpret_cast<Real*>(at.stage), &at.shared->pivots,
                       nullptr, 0);
  const bool failed = at.shared->pivots.info != 0;
  if (diagnosed && !failed && warp < kProbeWarps) estimate_inverse(at, blocks, size);

  const int64_t tiles = (args.columns + kTileColumns - 1) / kTileColumns;
  const Right right{args.right + system * args.right_batch, args.right_row, args.columns, at.scale};
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const int64_t first_column = tile * kTileColumns;
    if (!failed) {
      at.fill(blocks, [&](int row, int column) { return right.at(row, first_column + column); });
      double error = INFINITY;
      for (int step = 0;; ++step) {
        at.share().forward(at.a, blocks);
        at.share().backward(at.a, blocks);
        at.add_correction(blocks);
        residual(at, blocks, size, matrix, args.matrix_row, right, first_column);
        if (!At::kSingle) break;
        const double* const t = at.shared->total;
        const double now = relative(t[0], t[1], t[2], at.shared->largest);
        const bool enough =
            now <= kAccepted && now * at.shared->largest <= kForward * at.smallest();
        if (enough || !(now < error) || step == kRefinements) break;
        error = now;
      }
    }
    const int64_t width = min(int64_t(kTileColumns), args.columns - first_column);
    double* const solution = args.solution + system * size * args.columns + first_column;
    for (int i = threadIdx.x; i < size * kTileColumns; i += kThreads) {
      const int row = i / kTileColumns, column = i % kTileColumns;
      if (column < width)
        solution[row * args.columns + column] =
            failed ? double(NAN) : at.scale[row] * at.exact[row * kTilePitch + column];
    }
    for (int strip = warp; strip < kStrips; strip += kWarps) {
      const int column = strip * kStripColumns + lane;
      double p = 0;
      if (args.mean_kept != nullptr && !failed)
        p = column_sum(size, [&](int row, int c) {
          const double d = at.scale[row];
          return d * at.exact[row * kTilePitch + strip * kStripColumns + c] *
                 (d == 0 ? 0 : args.mean_kept[system * size + row]);
        });
      if (lane < kStripColumns && column < width) {
        const int64_t place = system * args.columns + first_column + column;
        if (args.mean_kept != nullptr) p = args.mean_dropped[place] - p;
        args.shift[place] = failed ? double(NAN) : p;
      }
    }
    if (threadIdx.x == 0) {
      double* const partial = args.workspace + (system * tiles + tile) * kPartials;
      for (int n = 0; n < kPartials; ++n) partial[n] = failed ? double(NAN) : at.shared->total[n];
    }
    __syncthreads();  // the next tile overwrites this one
  }
  __syncthreads();  // without a tile, the estimates are still under way
  if (first && threadIdx.x == 0) {
    args.info[system] = at.shared->pivots.info;
    args.pivot[system] = at.shared->pivots.smallest;
    args.largest[system] = at.shared->largest;
    args.smallest[system] = failed ? double(NAN) : at.smallest();
  }
}

// sm_90 has room for whole tiles, so its code leaves the narrow ones out
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kLeastStrips = 8;
#else
constexpr int kLeastStrips = 1;
#endif

template <typename Real, int kStrips, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, LIAR_RESIDENT) solve(const LiarSolveSmall args) {
  if constexpr (kStrips >= kLeastStrips)
    solve_system<Real, kStrips, kWarps>(args);
  else
    __trap();
}

// one thread per system: what its tiles found, in a fixed order
__global__ void gather(const LiarSolveSmall args, int64_t tiles) {
  const int64_t system = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (system >= args.batch) return;
  double total[kPartials] = {};
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int n = 0; n < kPartials; ++n)
      total[n] += args.workspace[(system * tiles + tile) * kPartials + n];
  args.error[system] = relative(total[0], total[1], total[2], args.largest[system]);
}

// the ways to run a system: what they need and how they are launched
struct Variant {
  bool single;
  int rows, tile_columns;
  size_t (*bytes)(int blocks);
  cudaError_t (*launch)(const LiarSolveSmall&, unsigned spread, size_t bytes);
};

template <typename Real, int kStrips, int kWarps>
cudaError_t launch(const LiarSolveSmall& args, unsigned spread, size_t bytes) {
  return liar_launch(solve<Real, kStrips, kWarps>, dim3(unsigned(args.batch), spread),
                     dim3(32 * kWarps), bytes, args.stream, args);
}

template <typename Real, int kStrips, int kWarps>
constexpr Variant variant(int rows) {
  using At = Layout<Real, kStrips, kWarps>;
  return {At::kSingle, rows, kStrips * kStripColumns, At::bytes, launch<Real, kStrips, kWarps>};
}

// the first one that fits is taken. Up to 64 rows, half the warps let several systems share a
// multiprocessor (not in float: ptxas 13.0 spills that kernel); with 163 KiB or less, the tiles
// have half the columns
constexpr Variant kVariants[] = {
    variant<double, 8, 4>(64),       variant<double, 8, 8>(kMaximum),
    variant<double, 4, 4>(kMaximum), variant<float, 8, 8>(kMaximum),
    variant<float, 4, 4>(kMaximum),
};

bool serves(const Variant& variant, int size, bool single) {
  return variant.single == single && size <= variant.rows;
}

int blocks_of(int size) { return (size + kBlock - 1) / kBlock; }

}  // namespace
}  // namespace liar

extern "C" int64_t liar_solve_small_workspace(int64_t batch, int64_t columns) {
  // as many tiles as the narrowest variant has
  return batch * liar::kPartials * ((columns + 31) / 32);
}

extern "C" int64_t liar_solve_small_shared(int32_t size, int32_t single) {
  if (size < 1 || size > liar::kMaximum) return -1;
  int64_t least = -1;
  for (const auto& variant : liar::kVariants) {
    const int64_t bytes = int64_t(variant.bytes(liar::blocks_of(size)));
    if (liar::serves(variant, size, single) && (least < 0 || bytes < least)) least = bytes;
  }
  return least;
}

extern "C" int64_t liar_solve_shared_limit(int device) {
  int limit = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error == cudaSuccess ? limit : 0;
}

extern "C" int liar_solve_small(const LiarSolveSmall* args) {
  using namespace liar;
  if (args->batch == 0) return cudaSuccess;
  if (args->size < 1 || args->size > kMaximum || args->batch >= (int64_t(1) << 31))
    return cudaErrorInvalidValue;
  int device = 0, limit = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return int(error);
  for (const Variant& variant : kVariants) {
    const size_t bytes = variant.bytes(blocks_of(args->size));
    if (!serves(variant, args->size, args->single) || bytes > size_t(limit)) continue;
    const int64_t tiles = (args->columns + variant.tile_columns - 1) / variant.tile_columns;
    // every block factors the system again, so columns are only spread over idle processors
    const int64_t idle = processors / args->batch;
    const int64_t spread = tiles < idle ? tiles : idle;
    const unsigned y = unsigned(spread < 1 ? 1 : spread > 65535 ? 65535 : spread);
    error = variant.launch(*args, y, bytes);
    if (error != cudaSuccess) return int(error);
    const dim3 threads(128);
    return int(liar_launch(gather, dim3(unsigned((args->batch + 127) / 128)), threads, 0,
                           args->stream, *args, tiles));
  }
  return cudaErrorInvalidConfiguration;
}

// Gram accumulation on a CPU: pack once, then multiply the tiles of one triangle
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "blas.h"
#include "pack.h"
#include "tile.h"

namespace liar {
namespace {

// tokens packed at a time: as many as 16 MiB of fp32 hold, and at least 2048, so that a square of G
// is read and written seldom. few chunks also mean few barriers, which cost most where cores are
// shared: at n = 512 on two busy cores, 40 ms of waiting for 6 ms of work
int64_t chunk_for(int64_t columns) {
  const int64_t fit = (int64_t(16) << 20) / (columns * int64_t(sizeof(float)));
  return std::max<int64_t>(2048, fit / 2 * 2);
}

// a thread for every 2^28 multiply-adds (about 2 ms), the rest stay asleep
int threads_for(const LiarGram& args, int64_t tokens) {
  const double work = double(args.columns) * double(args.panel) * double(tokens) / (1 << 28);
  return int(std::clamp<double>(work, 1, std::max(1, args.threads)));
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

Buffer allocate(int64_t bytes) {
  constexpr int64_t huge = 2 << 20;
  bytes = (bytes + huge - 1) / huge * huge;
  void* p = std::aligned_alloc(huge, bytes);
#ifdef MADV_HUGEPAGE
  if (p) madvise(p, bytes, MADV_HUGEPAGE);  // a hint: fewer page faults on a fresh 16-180 MB buffer
#endif
  return Buffer(static_cast<float*>(p));
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// a square of G that one thread keeps in its L2 while all the steps of a chunk stream past
struct Square {
  int64_t row, column;  // first panels
};

// panels on a side of a square. 8 x 48 = 384 columns are 576 KiB of accumulators, in a 1 MiB L2;
// 4 and 12 run at the same rate on one core, 8 asks less of the memory that cores share. smaller
// when threads would be left without work.
int64_t side_for(int64_t panels, int threads) {
  int64_t side = 8;
  while (side > 1) {
    const int64_t squares = divide_up(panels, side);
    if (squares * (squares + 1) / 2 >= 4 * threads) break;
    side /= 2;
  }
  return side;
}

void multiply_square(const LiarGram& args, const float* packed, int64_t steps, Square at,
                     int64_t side, MicroKernel micro, float* local) {
  const int64_t panels = divide_up(args.columns, kPanel);
  const int64_t wanted = divide_up(args.panel, kPanel);
  const int64_t row_end = std::min(panels, at.row + side);
  const int64_t column_end = std::min(wanted, at.column + side);
  constexpr int64_t tile = kPanel * kPanel;
  for (int64_t k = 0; k < steps; k += kDepth) {
    const int64_t depth = std::min(kDepth, steps - k);
    for (int64_t j = at.column; j < column_end; ++j) {
      const float* b = packed + (j * steps + k) * kPanel;
      for (int64_t i = std::max(at.row, j); i < row_end; ++i) {
        const float* a = packed + (i * steps + k) * kPanel;
        float* c = local + ((i - at.row) * side + (j - at.column)) * tile;
        for (int s = 0; s < kSlivers; ++s)
          micro(depth, a + s * kSliver, b, c + s * kSliver * kPanel, k == 0);
      }
    }
  }
  for (int64_t i = at.row; i < row_end; ++i) {
    const int64_t rows = std::min<int64_t>(kPanel, args.columns - i * kPanel);
    for (int64_t r = 0; r < rows; ++r) {
      float* out = args.gram + (i * kPanel + r) * args.gram_stride;
      for (int64_t j = at.column; j < std::min(column_end, i + 1); ++j) {
        const int64_t columns = std::min<int64_t>(kPanel, args.panel - j * kPanel);
        const float* c = local + ((i - at.row) * side + (j - at.column)) * tile + r * kPanel;
        for (int64_t e = 0; e < columns; ++e) out[j * kPanel + e] += c[e];
      }
    }
  }
}

int gram_tiles(const LiarGram& args, int64_t tokens, bool pairs, MicroKernel micro) {
  const int threads = threads_for(args, tokens);
  const int64_t panels = divide_up(args.columns, kPanel);
  const int64_t side = side_for(panels, threads);
  const int64_t square_bytes = side * side * kPanel * kPanel * int64_t(sizeof(float));
  const int64_t chunk = std::min(tokens, chunk_for(args.columns));
  const Buffer packed = allocate(panels * packed_steps(chunk, pairs) * kPanel * sizeof(float));
  const Buffer squares = allocate(threads * square_bytes);
  if (!packed || !squares) return LIAR_OUT_OF_MEMORY;

  const int64_t rows = divide_up(panels, side);
  const int64_t columns = divide_up(divide_up(args.panel, kPanel), side);
  const int64_t group = std::clamp<int64_t>(panels / (4 * threads), 1, 8);
  for (int64_t first = 0; first < tokens; first += chunk) {
    const Tokens part{&args, first, std::min(chunk, tokens - first)};
    const int64_t steps = packed_steps(part.count, pairs);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
      for (int64_t p = 0; p < panels; p += group)
        pack_panels(part, p, std::min(panels, p + group), pairs, packed.get());
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
          if (j > i) continue;
#ifdef _OPENMP
          const int thread = omp_get_thread_num();
#else
          const int thread = 0;
#endif
          float* local = squares.get() + thread * square_bytes / int64_t(sizeof(float));
          multiply_square(args, packed.get(), steps, {i * side, j * side}, side, micro, local);
        }
    }
  }
  return LIAR_OK;
}

int gram_blas(const LiarGram& args, int64_t tokens, bool bf16) {
  const int threads = threads_for(args, tokens);
  const int64_t chunk = std::min(tokens, chunk_for(args.columns));
  const Buffer rows = allocate(chunk * args.columns * (bf16 ? 2 : 4));
  if (!rows) return LIAR_OUT_OF_MEMORY;
  const int64_t group = std::max<int64_t>(64, divide_up(args.columns, 4 * threads));
  for (int64_t first = 0; first < tokens; first += chunk) {
    const Tokens part{&args, first, std::min(chunk, tokens - first)};
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t c = 0; c < args.columns; c += group)
      pack_rows(part, c, std::min(args.columns, c + group), !bf16, rows.get());
    blas_gram(rows.get(), bf16, part.count, args.columns, args.panel, args.gram, args.gram_stride);
  }
  return LIAR_OK;
}

}  // namespace
}  // namespace liar

extern "C" int liar_gram_cpu_can(int32_t path, int32_t dtype) {
  using namespace liar;
  switch (path) {
    case LIAR_PATH_AVX512_BF16: return dtype == LIAR_BF16 && cpu_has_avx512_bf16();
    case LIAR_PATH_AVX512: return cpu_has_avx512();
    case LIAR_PATH_BLAS: return blas_has_sgemm();
    case LIAR_PATH_GENERIC: return 1;
    default: return 0;
  }
}

extern "C" int liar_gram_cpu_path(int32_t dtype) {
  using namespace liar;
  // AMX multiplies bf16 about four times as fast as vdpbf16ps; only the BLAS here uses it
  if (dtype == LIAR_BF16 && cpu_has_amx_bf16() && blas_has_bf16()) return LIAR_PATH_BLAS;
  for (int32_t path : {LIAR_PATH_AVX512_BF16, LIAR_PATH_AVX512, LIAR_PATH_BLAS})
    if (liar_gram_cpu_can(path, dtype)) return path;
  return LIAR_PATH_GENERIC;
}

extern "C" int liar_gram_cpu(const LiarGram* args) {
  using namespace liar;
  const int32_t path = args->path == LIAR_PATH_AUTO ? liar_gram_cpu_path(args->dtype) : args->path;
  if (!liar_gram_cpu_can(path, args->dtype)) return LIAR_NO_SUCH_PATH;
  const int64_t tokens = args->valid_count < 0 ? args->rows : args->valid_count;
  if (tokens == 0 || args->columns == 0) return LIAR_OK;
  switch (path) {
    case LIAR_PATH_AVX512_BF16: return gram_tiles(*args, tokens, true, micro_avx512_bf16);
    case LIAR_PATH_AVX512: return gram_tiles(*args, tokens, false, micro_avx512);
    case LIAR_PATH_BLAS:
      return gram_blas(*args, tokens, args->dtype == LIAR_BF16 && blas_has_bf16());
    default: return gram_tiles(*args, tokens, false, micro_generic);
  }
}

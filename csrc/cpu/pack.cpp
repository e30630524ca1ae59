#include "pack.h"

#include <algorithm>
#include <cstring>

#include "tile.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace liar {
namespace {

float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | ((rest & 0x3ff) << 13));
  if (rest >= 0x0400) return bits_to_float(sign | ((rest << 13) + 0x38000000));
  const float magnitude = float(rest) * 0x1p-24f;  // subnormal: exact in fp32
  return sign ? -magnitude : magnitude;
}

float load(const LiarGram& args, int64_t row, int64_t column) {
  const int64_t at = row * args.row_stride + column;
  if (args.dtype == LIAR_F32) return static_cast<const float*>(args.x)[at];
  const uint16_t bits = static_cast<const uint16_t*>(args.x)[at];
  return args.dtype == LIAR_F16 ? half_to_float(bits) : bits_to_float(uint32_t(bits) << 16);
}

uint16_t load_bits(const LiarGram& args, int64_t row, int64_t column) {
  return static_cast<const uint16_t*>(args.x)[row * args.row_stride + column];
}

int64_t source_column(const LiarGram& args, int64_t position) {
  return args.order ? args.order[position] : position;
}

// steps [begin, end) of one panel, any dtype, any order; sums[kPanel] gets their column sums
void pack_block(const Tokens& tokens, int64_t panel, int64_t begin, int64_t end, bool pairs,
                float* out, double* sums) {
  const LiarGram& args = *tokens.args;
  const int64_t width = std::min<int64_t>(kPanel, args.columns - panel * kPanel);
  int64_t source[kPanel];
  for (int64_t c = 0; c < width; ++c) source[c] = source_column(args, panel * kPanel + c);
  for (int64_t k = begin; k < end; ++k, out += kPanel) {
    if (pairs) {
      const bool odd = 2 * k + 1 >= tokens.count;
      const int64_t low_row = tokens.row(2 * k), high_row = odd ? low_row : tokens.row(2 * k + 1);
      for (int64_t c = 0; c < width; ++c) {
        const uint32_t low = load_bits(args, low_row, source[c]);
        const uint32_t high = odd ? 0 : load_bits(args, high_row, source[c]);
        out[c] = bits_to_float(low | high << 16);
        sums[c] += double(bits_to_float(low << 16)) + double(bits_to_float(high << 16));
      }
    } else {
      const int64_t row = tokens.row(k);
      for (int64_t c = 0; c < width; ++c) {
        out[c] = load(args, row, source[c]);
        sums[c] += double(out[c]);
      }
    }
    for (int64_t c = width; c < kPanel; ++c) out[c] = 0.0f;
  }
}

#if defined(__x86_64__)
#define LIAR_AVX512 __attribute__((target("avx512f,avx512bw")))

LIAR_AVX512 inline __m512i widen(const uint16_t* bits) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits)));
}

// 16 columns of a row onto their sums. in double: fp32 sums over 256 rows left the mean, and with
// it the intercept P, ten times less exact than G allows (2.4e-5 against 5e-6 at n = 512)
LIAR_AVX512 inline void add_columns(__m512 value, __m512d* total) {
  const __m512d upper = _mm512_castps_pd(value);
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(upper, 1));
  total[0] = _mm512_add_pd(total[0], _mm512_cvtps_pd(_mm512_castps512_ps256(value)));
  total[1] = _mm512_add_pd(total[1], _mm512_cvtps_pd(high));
}

// the same for a whole panel of consecutive columns: 48 columns a step instead of one
LIAR_AVX512 void pack_block_avx512(const Tokens& tokens, int64_t panel, int64_t begin, int64_t end,
                                   bool pairs, float* out, double* sums) {
  const LiarGram& args = *tokens.args;
  const int64_t column = panel * kPanel;
  const auto* wide = static_cast<const float*>(args.x) + column;
  const auto* narrow = static_cast<const uint16_t*>(args.x) + column;
  __m512d total[6];
  for (int v = 0; v < 6; ++v) total[v] = _mm512_loadu_pd(sums + 8 * v);
  for (int64_t k = begin; k < end; ++k, out += kPanel) {
    if (pairs) {
      const bool odd = 2 * k + 1 >= tokens.count;
      const uint16_t* low_row = narrow + tokens.row(2 * k) * args.row_stride;
      const uint16_t* high_row = odd ? low_row : narrow + tokens.row(2 * k + 1) * args.row_stride;
      for (int v = 0; v < 3; ++v) {
        const __m512i low = widen(low_row + 16 * v);
        const __m512i high =
            odd ? _mm512_setzero_si512() : _mm512_slli_epi32(widen(high_row + 16 * v), 16);
        add_columns(_mm512_castsi512_ps(_mm512_slli_epi32(low, 16)), total + 2 * v);
        add_columns(_mm512_castsi512_ps(high), total + 2 * v);
        _mm512_storeu_si512(out + 16 * v, _mm512_or_si512(low, high));
      }
    } else {
      const int64_t at = tokens.row(k) * args.row_stride;
      for (int v = 0; v < 3; ++v) {
        __m512 value;
        if (args.dtype == LIAR_F32) {
          value = _mm512_loadu_ps(wide + at + 16 * v);
        } else if (args.dtype == LIAR_F16) {
          value = _mm512_cvtph_ps(
              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(narrow + at + 16 * v)));
        } else {
          value = _mm512_castsi512_ps(_mm512_slli_epi32(widen(narrow + at + 16 * v), 16));
        }
        add_columns(value, total + 2 * v);
        _mm512_storeu_ps(out + 16 * v, value);
      }
    }
  }
  for (int v = 0; v < 6; ++v) _mm512_storeu_pd(sums + 8 * v, total[v]);
}
#endif

}  // namespace

void pack_panels(const Tokens& tokens, int64_t begin, int64_t end, bool pairs, float* out) {
  const LiarGram& args = *tokens.args;
  const int64_t steps = packed_steps(tokens.count, pairs);
  // all the panels of a band of rows before the next band: neighbouring panels share cache lines
  for (int64_t k = 0; k < steps; k += kDepth) {
    const int64_t stop = std::min(steps, k + kDepth);
    for (int64_t panel = begin; panel < end; ++panel) {
      double sums[kPanel] = {};
      float* block = out + (panel * steps + k) * kPanel;
      const int64_t width = std::min<int64_t>(kPanel, args.columns - panel * kPanel);
#if defined(__x86_64__)
      if (width == kPanel && !args.order && cpu_has_avx512())
        pack_block_avx512(tokens, panel, k, stop, pairs, block, sums);
      else
#endif
        pack_block(tokens, panel, k, stop, pairs, block, sums);
      for (int64_t c = 0; c < width; ++c)
        args.sum[source_column(args, panel * kPanel + c)] += sums[c];
    }
  }
}

void pack_rows(const Tokens& tokens, int64_t begin, int64_t end, bool widen_input, void* out) {
  const LiarGram& args = *tokens.args;
  for (int64_t k = 0; k < tokens.count; ++k) {
    const int64_t row = tokens.row(k);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t source = source_column(args, c);
      const float value = load(args, row, source);
      args.sum[source] += double(value);
      if (widen_input)
        static_cast<float*>(out)[k * args.columns + c] = value;
      else
        static_cast<uint16_t*>(out)[k * args.columns + c] = load_bits(args, row, source);
    }
  }
}

}  // namespace liar

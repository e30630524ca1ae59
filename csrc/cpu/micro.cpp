// register tiles of the Gram kernel: 8 rows of G by 48 columns
#include "tile.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace liar {

void micro_generic(int64_t steps, const float* a, const float* b, float* c, bool fresh) {
  float sums[kSliver * kPanel] = {};
  for (int64_t k = 0; k < steps; ++k, a += kPanel, b += kPanel)
    for (int i = 0; i < kSliver; ++i)
      for (int j = 0; j < kPanel; ++j) sums[i * kPanel + j] += a[i] * b[j];
  for (int e = 0; e < kSliver * kPanel; ++e) c[e] = fresh ? sums[e] : c[e] + sums[e];
}

#if defined(__x86_64__)

// written out by a macro: the target attribute must sit on the function that holds the intrinsics,
// and gcc keeps the 24 accumulators in registers only when every index is a literal
#define LIAR_ADD_STORE(at, acc) _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), acc));
#define LIAR_ROW_STORE(i)                           \
  if (fresh) {                                      \
    _mm512_storeu_ps(c + i * kPanel, c##i##0);      \
    _mm512_storeu_ps(c + i * kPanel + 16, c##i##1); \
    _mm512_storeu_ps(c + i * kPanel + 32, c##i##2); \
  } else {                                          \
    LIAR_ADD_STORE(c + i * kPanel, c##i##0)         \
    LIAR_ADD_STORE(c + i * kPanel + 16, c##i##1)    \
    LIAR_ADD_STORE(c + i * kPanel + 32, c##i##2)    \
  }
#define LIAR_ROW_ZERO(i) __m512 c##i##0 = _mm512_setzero_ps(), c##i##1 = c##i##0, c##i##2 = c##i##0;
#define LIAR_ROW_STEP(i)                   \
  {                                        \
    const __m512 v = _mm512_set1_ps(a[i]); \
    c##i##0 = LIAR_DOT(c##i##0, v, b0);    \
    c##i##1 = LIAR_DOT(c##i##1, v, b1);    \
    c##i##2 = LIAR_DOT(c##i##2, v, b2);    \
  }
#define LIAR_ROWS(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7)
#define LIAR_MICRO_BODY                                           \
  LIAR_ROWS(LIAR_ROW_ZERO)                                        \
  for (int64_t k = 0; k < steps; ++k, a += kPanel, b += kPanel) { \
    const __m512 b0 = _mm512_loadu_ps(b);                         \
    const __m512 b1 = _mm512_loadu_ps(b + 16);                    \
    const __m512 b2 = _mm512_loadu_ps(b + 32);                    \
    LIAR_ROWS(LIAR_ROW_STEP)                                      \
  }                                                               \
  LIAR_ROWS(LIAR_ROW_STORE)

#define LIAR_DOT(acc, x, y) _mm512_fmadd_ps(x, y, acc)
__attribute__((target("avx512f"))) void micro_avx512(int64_t steps, const float* a, const float* b,
                                                     float* c, bool fresh){LIAR_MICRO_BODY}
#undef LIAR_DOT

#define LIAR_DOT(acc, x, y) _mm512_dpbf16_ps(acc, (__m512bh)(x), (__m512bh)(y))
__attribute__((target("avx512f,avx512bf16"))) void micro_avx512_bf16(int64_t steps, const float* a,
                                                                     const float* b, float* c,
                                                                     bool fresh) {
  LIAR_MICRO_BODY
}
#undef LIAR_DOT

bool cpu_has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}
bool cpu_has_avx512_bf16() { return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16"); }

bool cpu_has_amx_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  // leaf 7, edx: bit 22 AMX-BF16, bit 24 AMX-TILE
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & (1u << 22)) && (d & (1u << 24));
}

#else

void micro_avx512(int64_t, const float*, const float*, float*, bool) {}
void micro_avx512_bf16(int64_t, const float*, const float*, float*, bool) {}
bool cpu_has_avx512() { return false; }
bool cpu_has_avx512_bf16() { return false; }
bool cpu_has_amx_bf16() { return false; }

#endif

}  // namespace liar

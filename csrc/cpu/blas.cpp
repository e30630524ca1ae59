#include "blas.h"

#include <dlfcn.h>

#include <algorithm>

namespace liar {
namespace {

// MKL's LP64 interface, which is the one libtorch_cpu.so exports
using Sgemm = void (*)(const char*, const char*, const int*, const int*, const int*, const float*,
                       const float*, const int*, const float*, const int*, const float*, float*,
                       const int*);
using Bf16Gemm = void (*)(const char*, const char*, const int*, const int*, const int*,
                          const float*, const uint16_t*, const int*, const uint16_t*, const int*,
                          const float*, float*, const int*);

// torch loads its libraries without RTLD_GLOBAL, so they are asked by name; NOLOAD: never a new one
void* find(const char* name) {
  for (const char* library : {"libtorch_cpu.so", "libmkl_rt.so.2"}) {
    if (void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD)) {
      void* symbol = dlsym(handle, name);
      dlclose(handle);
      if (symbol) return symbol;
    }
  }
  return nullptr;
}

Sgemm sgemm() {
  static const auto symbol = reinterpret_cast<Sgemm>(find("sgemm_"));
  return symbol;
}

Bf16Gemm bf16_gemm() {
  static const auto symbol = reinterpret_cast<Bf16Gemm>(find("gemm_bf16bf16f32_"));
  return symbol;
}

}  // namespace

bool blas_has_sgemm() { return sgemm() != nullptr; }
bool blas_has_bf16() { return bf16_gemm() != nullptr; }

void blas_gram(const void* a, bool bf16, int64_t rows, int64_t n, int64_t panel, float* gram,
               int64_t gram_stride) {
  // 512: at n = 4096 a triangle of 8 x 8 blocks wastes 12 %, and the calls still run at full rate
  const int64_t width = 512;
  const float one = 1.0f;
  const int k = int(rows), lda = int(n), ldc = int(gram_stride);
  for (int64_t j = 0; j < panel; j += width) {
    // column-major BLAS sees Gᵀ and Aᵀ: Gᵀ[j0:j1, j0:n] += (Aᵀ)[j0:j1, :] (Aᵀ)[j0:n, :]ᵀ
    const int m = int(std::min(width, panel - j)), cols = int(n - j);
    float* c = gram + j * gram_stride + j;
    if (bf16) {
      const auto* x = static_cast<const uint16_t*>(a) + j;
      bf16_gemm()("N", "T", &m, &cols, &k, &one, x, &lda, x, &lda, &one, c, &ldc);
    } else {
      const auto* x = static_cast<const float*>(a) + j;
      sgemm()("N", "T", &m, &cols, &k, &one, x, &lda, x, &lda, &one, c, &ldc);
    }
  }
}

}  // namespace liar

// the BLAS that libtorch_cpu.so already carries, found at run time
#pragma once
#include <cstdint>

namespace liar {

bool blas_has_sgemm();
bool blas_has_bf16();

// G[j0:n, j0:j1] += A[:, j0:n]ᵀ A[:, j0:j1] by panels over row-major A (rows, n), fp32 or bf16
void blas_gram(const void* a, bool bf16, int64_t rows, int64_t n, int64_t panel, float* gram,
               int64_t gram_stride);

}  // namespace liar

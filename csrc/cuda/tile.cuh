// 32 x 32 blocks in shared memory and the one product every step of a small solve is made of:
// a warp multiplies a 32 x 32 block by a strip of 8 columns.
//
// double runs on the tensor cores (mma m8n8k4, IEEE double), float on the ordinary units: TF32
// would lose the digits that refinement starts from. Both keep the accumulator in the layout of the
// mma, so the code around the product is the same.
#pragma once
#include "launch.cuh"

namespace liar {

constexpr int kBlock = 32;
// 36 mod 16 = 4: the fragments below, 4 x 4 elements per half-warp, then fall into different banks
// both along rows and along columns
constexpr int kPitch = 36;
constexpr int kBlockElements = kBlock * kPitch;
constexpr int kStripColumns = 8;

// lane l of a warp owns rows 8 i + l / 4 and columns 2 (l % 4) + e of a 32 x 8 strip
template <typename Real>
struct Strip {
  Real value[4][2] = {};

  // f(row, column, value&) for every element of the lane
  template <typename F>
  __device__ __forceinline__ void each(F f) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) f(8 * i + lane / 4, 2 * (lane % 4) + e, value[i][e]);
  }
};

template <typename Real>
__device__ __forceinline__ void operator-=(Strip<Real>& left, const Strip<Real>& right) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int e = 0; e < 2; ++e) left.value[i][e] -= right.value[i][e];
}

// f(n, row, column, value&) for every element of the lane in strips[n]
template <typename Real, int kCount, typename F>
__device__ __forceinline__ void each_element(Strip<Real> (&strips)[kCount], F f) {
#pragma unroll
  for (int n = 0; n < kCount; ++n)
    strips[n].each([&](int row, int column, Real& v) { f(n, row, column, v); });
}

__device__ __forceinline__ void multiply_8x8x4(double (&c)[2], double a, double b) {
#ifdef LIAR_CUDA_HOST
  cuda_host::mma_m8n8k4(c, a, b);
#else
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
#endif
}

// strips[n] += A B_n with A (32, 32) at a[row * kARow + k * kAK] and B_n (32, 8) at
// b[n * step + k * kBK + column * kBColumn]; all lanes of the warp take part. A is read once for
// all strips of the warp.
template <int kARow, int kAK, int kBK, int kBColumn, int kCount>
__device__ __forceinline__ void multiply(Strip<double> (&strips)[kCount], const double* a,
                                         const double* b, int step = 0) {
  const int lane = threadIdx.x % 32, group = lane / 4, within = lane % 4;
  a += group * kARow + within * kAK;
  b += within * kBK + group * kBColumn;
  // a lone strip has four chains of eight dependent mma: two sums each halve their length
  constexpr bool kSplit = kCount == 1;
  Strip<double> odd[kCount];
#pragma unroll 4
  for (int k = 0; k < kBlock; k += 4) {
    double left[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) left[i] = a[8 * i * kARow + k * kAK];
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const double right = b[n * step + k * kBK];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        multiply_8x8x4((kSplit && k % 8 ? odd[n] : strips[n]).value[i], left[i], right);
    }
  }
  if (kSplit) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) strips[0].value[i][e] += odd[0].value[i][e];
  }
}

template <int kARow, int kAK, int kBK, int kBColumn, int kCount>
__device__ __forceinline__ void multiply(Strip<float> (&strips)[kCount], const float* a,
                                         const float* b, int step = 0) {
  const int lane = threadIdx.x % 32;
  a += lane / 4 * kARow;
  b += 2 * (lane % 4) * kBColumn;
#pragma unroll 4
  for (int k = 0; k < kBlock; ++k) {
    float left[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) left[i] = a[8 * i * kARow + k * kAK];
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float right = b[n * step + k * kBK + e * kBColumn];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          strips[n].value[i][e] = fmaf(left[i], right, strips[n].value[i][e]);
      }
  }
}

// a symmetric or lower triangular matrix as its lower triangle of blocks
template <typename Real>
struct Blocks {
  Real* data;

  static constexpr __host__ __device__ int count(int blocks) { return blocks * (blocks + 1) / 2; }
  __device__ __forceinline__ Real* at(int i, int j) const {
    return data + (i * (i + 1) / 2 + j) * kBlockElements;
  }
};

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// NaN if any is: fmax would hide it
template <typename T>
__device__ __forceinline__ T larger(T a, T b) {
  return a > b || isnan(a) ? a : b;
}

template <typename T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int step = 16; step; step /= 2) value = larger(value, __shfl_xor_sync(~0u, value, step));
  return value;
}

// Σ over rows of f(row, lane % 8), the same in all lanes of a column
template <typename F>
__device__ __forceinline__ double column_sum(int rows, F f) {
  const int lane = threadIdx.x % 32;
  double sum = 0;
  for (int row = lane / 8; row < rows; row += 4) sum += f(row, lane % 8);
  sum += __shfl_xor_sync(~0u, sum, 8);
  return sum + __shfl_xor_sync(~0u, sum, 16);
}

}  // namespace liar

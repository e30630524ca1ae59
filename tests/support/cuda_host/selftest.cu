// small kernels, right and wrong, that tests/cuda/test_emulator.py runs to prove the emulator
#include "../../../csrc/cuda/launch.cuh"

namespace {

// reverses 64 numbers through shared memory, with or without the barrier that makes it right
template <bool kBarrier>
__global__ void reverse(const float* in, float* out) {
  __shared__ float staged[64];
  staged[threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
  if (kBarrier) __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = staged[63 - threadIdx.x];
}

__global__ void sum_warp(const double* in, double* out, unsigned* votes) {
  double value = in[threadIdx.x];
  const unsigned vote = __ballot_sync(~0u, value > 0);
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  if (threadIdx.x == 0) *out = value, *votes = vote;
}

// 0: half of the threads leave; 1: two barriers in two branches; 2: a shuffle without its partner
__global__ void diverge(int how) {
  if (how == 0 && threadIdx.x >= 32) return;
  if (how == 1 && threadIdx.x < 32) {
    __syncthreads();
  } else if (how == 2 && threadIdx.x == 5) {
    __syncwarp();
  } else {
    if (how == 2) __shfl_sync(~0u, 1, 0);
    __syncthreads();
  }
}

__global__ void write_shared(int at) {
  LIAR_DYNAMIC_SHARED(memory);
  memory[at] = 1;
}

__global__ void read_shared(float* out) {
  LIAR_DYNAMIC_SHARED(memory);
  __shared__ float fixed[2];
  out[0] = reinterpret_cast<float*>(memory)[threadIdx.x];
  out[1] = fixed[1];
  reinterpret_cast<float*>(memory)[0] = fixed[1] = 1;  // the next block must not see it
}

}  // namespace

extern "C" {
#define EXPORT __attribute__((visibility("default")))
EXPORT int selftest_reverse(const float* in, float* out, int blocks, int barrier) {
  return liar_launch(barrier ? reverse<true> : reverse<false>, dim3(blocks), dim3(64), 0, nullptr,
                     in, out);
}
EXPORT int selftest_sum(const double* in, double* out, unsigned* votes) {
  return liar_launch(sum_warp, dim3(1), dim3(32), 0, nullptr, in, out, votes);
}
EXPORT int selftest_diverge(int how) {
  return liar_launch(diverge, dim3(1), dim3(64), 0, nullptr, how);
}
EXPORT int selftest_write(int at, int bytes) {
  return liar_launch(write_shared, dim3(1), dim3(1), size_t(bytes), nullptr, at);
}
EXPORT int selftest_read(float* out) {
  return liar_launch(read_shared, dim3(2), dim3(1), 16, nullptr, out);
}
}

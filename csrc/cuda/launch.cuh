// what every kernel file needs and what differs between nvcc and the host emulator of the tests
#pragma once
#include <cuda_runtime.h>

// declares `unsigned char* name`: the block's dynamic shared memory, 16-byte aligned
#ifdef LIAR_CUDA_HOST
#define LIAR_DYNAMIC_SHARED(name) unsigned char* const name = cuda_host::dynamic_shared()
#else
#define LIAR_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// __launch_bounds__'s second number: without it ptxas holds some kernels to 168 registers on sm_80
// and spills; with it, it moves loads ahead on sm_90 until it spills
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LIAR_RESIDENT 0
#else
#define LIAR_RESIDENT 1
#endif

// a launch without <<<>>>, which only nvcc understands; raises the kernel's limit on dynamic shared
// memory, so the call itself is what fails on a device that has less
template <typename... Parameters, typename... Arguments>
cudaError_t liar_launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                        void* stream, Arguments&&... arguments) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error != cudaSuccess) {
    cudaGetLastError();  // or a later, unrelated check would find it
    return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
}

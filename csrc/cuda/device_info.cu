// what the CUDA runtime sees, and which of the compiled architectures a device would run
#include <cuda_runtime.h>

#include "../liar.h"

namespace {

__global__ void probe() {}

}  // namespace

extern "C" int liar_cuda_device_count(int* count) { return int(cudaGetDeviceCount(count)); }

extern "C" int liar_cuda_device(int device, int* capability, int* binary) {
  int major = 0, minor = 0, previous = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) error = cudaGetDevice(&previous);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return int(error);
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, probe);
  cudaSetDevice(previous);
  *capability = 10 * major + minor;
  *binary = error == cudaSuccess ? attributes.binaryVersion : 0;
  return int(error);
}

extern "C" const char* liar_cuda_error(int error) { return cudaGetErrorString(cudaError_t(error)); }

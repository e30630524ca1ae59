// CUDA on the host: g++ compiles the very .cu and .cuh files of csrc/cuda against this header, and
// the kernels run on CPU memory. What that proves is their logic: indices, strides, padding,
// barriers, warp exchanges, NaN handling. It proves nothing about speed, registers or asynchrony.
//
//     g++ -std=c++17 -O1 -march=native -ffp-contract=off -fPIC -shared -pthread
//         -Wno-unknown-pragmas -I tests/support/cuda_host -x c++ csrc/cuda/some.cu -o some.so
//
// or from Python `liar_cuda_host.build(["csrc/cuda/some.cu"])`, which returns a ctypes.CDLL. Rules
// for a source that compiles under both nvcc and g++:
//   - launch with cudaLaunchKernelEx (or liar_launch of csrc/cuda/launch.cuh), not with <<<>>>;
//   - dynamic shared memory by LIAR_DYNAMIC_SHARED(name) of csrc/cuda/launch.cuh;
//   - static shared memory as `__shared__ T name[n];` of trivial types, inside functions;
//   - inline PTX only behind `#ifdef __CUDA_ARCH__` or in a header replaced here (LIAR_CUDA_HOST is
//     defined): write the host version as an exchange (device.h) between the lanes.
//
// device.h runs the blocks one after another and a block's threads as fibers, which run until they
// wait. Shared memory holds NaN bytes when a block starts and has guards around it. Exported:
//   cuda_host_order(kind, seed)   0 first to last, 1 last to first, 2 random with interruptions
//   cuda_host_device(capability, shared_limit, processors)
//   cuda_host_report()            why the last launch failed (its status is
//                                 cudaErrorLaunchFailure), or ""
// For extensions: cuda_host::rendezvous / exchange (lanes meet), wait_until (a condition another
// thread makes true; deadlocks are found), barrier / barrier_arrive (named barriers), fail_here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "device.h"

#define LIAR_CUDA_HOST 1
#define __global__
#define __device__
#define __host__
#define __shared__ thread_local
#define __constant__ static const
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define __align__(n) alignas(n)
#define __launch_bounds__(...)

#define CUDA_HOST_SITE \
  const char *file = __builtin_FILE(), int line = __builtin_LINE()

// --- vector types --------------------------------------------------------------------------------

#define CUDA_HOST_VECTOR(type, name, bytes)                                       \
  struct alignas(2 * bytes) name##2 { type x, y; };                               \
  struct name##3 { type x, y, z; };                                               \
  struct alignas(4 * bytes > 16 ? 16 : 4 * bytes) name##4 { type x, y, z, w; };   \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }     \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_HOST_VECTOR(float, float, 4)
CUDA_HOST_VECTOR(double, double, 8)
CUDA_HOST_VECTOR(int, int, 4)
CUDA_HOST_VECTOR(long long, longlong, 8)
CUDA_HOST_VECTOR(unsigned short, ushort, 2)
#undef CUDA_HOST_VECTOR
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// --- the runtime API -----------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorNotSupported = 801,
  cudaErrorLaunchFailure = 719,
};

using cudaStream_t = struct CUstream_st*;

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int binaryVersion, maxThreadsPerBlock, numRegs;
};

struct cudaLaunchAttribute {
  int id;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace cuda_host {

inline cudaError_t last_error = cudaSuccess;

inline cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// dynamic shared memory that a kernel has asked for, beyond the 48 KiB that every kernel has
inline std::vector<std::pair<const void*, size_t>> opted_in;

inline size_t shared_allowed(const void* kernel) {
  for (const auto& [known, bytes] : opted_in)
    if (known == kernel) return bytes;
  return size_t(48) << 10;
}

}  // namespace cuda_host

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  using namespace cuda_host;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > device.shared_limit) return remember(cudaErrorInvalidValue);
  const auto key = reinterpret_cast<const void*>(kernel);
  for (auto& [known, bytes] : opted_in)
    if (known == key) return bytes = size_t(value), cudaSuccess;
  opted_in.emplace_back(key, size_t(value));
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  *attributes = {0, cuda_host::device.capability, 1024, 0};
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_host;
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const bool grid_ok = grid.x && grid.y && grid.z && grid.x < (1u << 31) && grid.y < 65536 &&
                       grid.z < 65536;
  if (!grid_ok || !threads || threads > 1024) return remember(cudaErrorInvalidConfiguration);
  if (config->dynamicSmemBytes > shared_allowed(reinterpret_cast<const void*>(kernel)))
    return remember(cudaErrorInvalidValue);
  // parameters are copied at the launch, as a device does
  const auto bound = std::tuple<std::decay_t<Parameters>...>(std::forward<Arguments>(arguments)...);
  const bool ok = run_grid(grid, block, config->dynamicSmemBytes,
                           [kernel, &bound] { std::apply(kernel, bound); });
  return remember(ok ? cudaSuccess : cudaErrorLaunchFailure);
}

inline cudaError_t cudaGetLastError() {
  return std::exchange(cuda_host::last_error, cudaSuccess);
}
inline cudaError_t cudaPeekAtLastError() { return cuda_host::last_error; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess              ? "no error"
         : error == cudaErrorLaunchFailure ? cuda_host::device.report.c_str()
                                           : "refused by the emulated runtime";
}
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* current) { return *current = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int wanted) {
  return wanted == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using cuda_host::device;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: return *value = device.processors, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: return *value = device.capability / 10, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: return *value = device.capability % 10, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = device.shared_limit, cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return memset(memory, value, bytes), cudaSuccess;
}

// --- barriers and warp exchanges -----------------------------------------------------------------

inline void __syncthreads(CUDA_HOST_SITE) { cuda_host::barrier(0, 0, {"__syncthreads", file, line}); }

inline void __syncwarp(uint32_t mask = ~0u, CUDA_HOST_SITE) {
  cuda_host::Rendezvous meeting;
  meeting.first = cuda_host::linear_thread() / 32 * 32;
  meeting.count = 32;
  // the last warp of a block may be short
  const size_t there = cuda_host::device.threads - meeting.first;
  meeting.mask = mask == ~0u && there < 32 ? (1u << there) - 1 : mask;
  cuda_host::rendezvous(meeting, nullptr, {"__syncwarp", file, line});
}

namespace cuda_host {

// each lane names the lane it reads; `argument` holds it, -1 for the lane's own value. A lane
// outside the mask has no defined value and is reported.
template <typename T>
void gather_lanes(Fiber** members, unsigned) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!members[lane]) continue;
    const int64_t from = members[lane]->meeting.argument;
    const Fiber* source = members[from < 0 ? lane : unsigned(from)];
    if (!source) return fail("lane %u shuffles from lane %lld, outside the mask", lane, (long long)from);
    memcpy(members[lane]->meeting.out, source->meeting.in, sizeof(T));
  }
}

inline int lane() { return int(linear_thread() % 32); }

template <typename T>
T shuffle(uint32_t mask, T value, int from, int low, int high, Site site) {
  static_assert(sizeof(T) <= 8, "shuffles move 4 or 8 bytes");
  return exchange<T, T>(mask, value, from < low || from > high ? -1 : from, gather_lanes<T>, site);
}

template <typename T, typename Op>
void reduce_lanes(Fiber** members, unsigned) {
  T total{};
  bool first = true;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!members[lane]) continue;
    const T value = *static_cast<const T*>(members[lane]->meeting.in);
    total = first ? value : Op()(total, value);
    first = false;
  }
  for (unsigned lane = 0; lane < 32; ++lane)
    if (members[lane]) *static_cast<T*>(members[lane]->meeting.out) = total;
}

struct Or {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};
template <typename T>
struct Sum {
  T operator()(T a, T b) const { return a + b; }
};
template <typename T>
struct Least {
  T operator()(T a, T b) const { return a < b ? a : b; }
};
template <typename T>
struct Most {
  T operator()(T a, T b) const { return a < b ? b : a; }
};

}  // namespace cuda_host

template <typename T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32, CUDA_HOST_SITE) {
  const int low = cuda_host::lane() / width * width;
  return cuda_host::shuffle(mask, value, low + (from & (width - 1)), low, low + width - 1,
                            {"__shfl_sync", file, line});
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, CUDA_HOST_SITE) {
  const int low = cuda_host::lane() / width * width;
  return cuda_host::shuffle(mask, value, cuda_host::lane() ^ bits, 0, low + width - 1,
                            {"__shfl_xor_sync", file, line});
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32, CUDA_HOST_SITE) {
  const int low = cuda_host::lane() / width * width;
  return cuda_host::shuffle(mask, value, cuda_host::lane() - int(by), low, 31,
                            {"__shfl_up_sync", file, line});
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32, CUDA_HOST_SITE) {
  const int low = cuda_host::lane() / width * width;
  return cuda_host::shuffle(mask, value, cuda_host::lane() + int(by), low, low + width - 1,
                            {"__shfl_down_sync", file, line});
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, CUDA_HOST_SITE) {
  const uint32_t bit = predicate ? 1u << cuda_host::lane() : 0u;
  return cuda_host::exchange<uint32_t, uint32_t>(
      mask, bit, 0, cuda_host::reduce_lanes<uint32_t, cuda_host::Or>, {"__ballot_sync", file, line});
}
inline int __any_sync(uint32_t mask, int predicate, CUDA_HOST_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, CUDA_HOST_SITE) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}
#define CUDA_HOST_REDUCE(name, type, op)                                                    \
  inline type name(uint32_t mask, type value, CUDA_HOST_SITE) {                             \
    return cuda_host::exchange<type, type>(                                                 \
        mask, value, 0, cuda_host::reduce_lanes<type, cuda_host::op>, {#name, file, line}); \
  }
CUDA_HOST_REDUCE(__reduce_add_sync, uint32_t, Sum<uint32_t>)
CUDA_HOST_REDUCE(__reduce_min_sync, int, Least<int>)
CUDA_HOST_REDUCE(__reduce_max_sync, int, Most<int>)
CUDA_HOST_REDUCE(__reduce_or_sync, uint32_t, Or)
#undef CUDA_HOST_REDUCE
inline uint32_t __activemask() { return ~0u; }

// --- tensor cores --------------------------------------------------------------------------------

namespace cuda_host {

struct Mma884 {
  double a, b, c[2];
};

inline void multiply_8x8x4(Fiber** members, unsigned) {
  const Mma884* in[32];
  for (unsigned lane = 0; lane < 32; ++lane)
    in[lane] = static_cast<const Mma884*>(members[lane]->meeting.in);
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned row = lane / 4, column = lane % 4 * 2;
    auto* out = static_cast<double2*>(members[lane]->meeting.out);
    double c[2] = {in[lane]->c[0], in[lane]->c[1]};
    for (unsigned k = 0; k < 4; ++k)
      for (unsigned e = 0; e < 2; ++e)
        c[e] = std::fma(in[4 * row + k]->a, in[4 * (column + e) + k]->b, c[e]);
    *out = {c[0], c[1]};
  }
}

// mma.sync.aligned.m8n8k4.row.col.f64: lane l holds a(l / 4, l % 4), b(l % 4, l / 4) and
// c(l / 4, 2 (l % 4) + {0, 1})
inline void mma_m8n8k4(double (&c)[2], double a, double b, CUDA_HOST_SITE) {
  const auto out = exchange<Mma884, double2>(~0u, Mma884{a, b, {c[0], c[1]}}, 0, multiply_8x8x4,
                                             {"mma.m8n8k4.f64", file, line});
  c[0] = out.x, c[1] = out.y;
}

}  // namespace cuda_host

// --- atomics: one fiber runs at a time, and none is interrupted inside one ------------------------

#define CUDA_HOST_ATOMIC(name, expression)                                  \
  template <typename T>                                                     \
  T name(T* address, std::common_type_t<T> value) {                         \
    const T old = *address;                                                 \
    return *address = (expression), old;                                    \
  }
CUDA_HOST_ATOMIC(atomicAdd, old + value)
CUDA_HOST_ATOMIC(atomicSub, old - value)
CUDA_HOST_ATOMIC(atomicMax, old < value ? value : old)
CUDA_HOST_ATOMIC(atomicMin, value < old ? value : old)
CUDA_HOST_ATOMIC(atomicOr, old | value)
CUDA_HOST_ATOMIC(atomicExch, value)
#undef CUDA_HOST_ATOMIC
template <typename T>
T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
  const T old = *address;
  return old == compare ? (*address = value, old) : old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// --- arithmetic ----------------------------------------------------------------------------------

using std::fma;
using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
template <typename To, typename From>
To cuda_host_bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  return memcpy(&to, &from, sizeof to), to;
}
inline int __float_as_int(float x) { return cuda_host_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_host_bits<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_host_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_host_bits<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_host_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_host_bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
// offsets from the dynamic shared memory, so that they fit the 32 bits of a shared address
inline size_t __cvta_generic_to_shared(const void* pointer) {
  return size_t(static_cast<const unsigned char*>(pointer) - cuda_host::dynamic_shared());
}
[[noreturn]] inline void __trap() { cuda_host::fail_here("trap", {"__trap", "", 0}); }

// --- what the tests call -------------------------------------------------------------------------

extern "C" {
__attribute__((used, visibility("default"))) inline void cuda_host_order(int order, uint64_t seed) {
  cuda_host::device.order = cuda_host::Order(order);
  // xorshift stays at zero once there
  cuda_host::device.random = seed * 0x9E3779B97F4A7C15u + 1;
}
__attribute__((used, visibility("default"))) inline void cuda_host_device(int capability,
                                                                           int shared_limit,
                                                                           int processors) {
  cuda_host::device.capability = capability;
  cuda_host::device.shared_limit = shared_limit;
  cuda_host::device.processors = processors;
}
__attribute__((used, visibility("default"))) inline const char* cuda_host_report() {
  return cuda_host::device.report.c_str();
}
}

// the primitives of csrc/cuda/hopper.cuh on the host. What is emulated is what a kernel can get
// wrong without a device noticing (hopper_wgmma.h has the multiplication):
//   - transaction barriers count arrivals and bytes, and a wait is for a phase's parity;
//   - tensor copies arrive late (at once, at the next wait, or at random, by the order of the
//     launch), write the 128-byte swizzle by address bits, and fill with zeros outside the tensor.
// Shared addresses start at kBase, which is not a multiple of 1024: a device promises 16.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#define LIAR_HOPPER_CODE 1

namespace liar::hopper {
namespace host {

inline float bf16_value(uint32_t bits) { return cuda_host_bits<float>(bits << 16); }

inline float f16_value(uint32_t bits) {
  const int exponent = int(bits >> 10 & 31), fraction = int(bits & 1023);
  float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                : exponent     ? std::ldexp(float(1024 + fraction), exponent - 25)
                               : std::ldexp(float(fraction), -24);
  return bits & 0x8000 ? -value : value;
}

constexpr uint32_t kBase = 0x410;

// the blocks of a cluster run as one emulated block: its threads and its shared memory in equal
// parts
inline int cluster = 1;

inline int rank() {
  return int(cuda_host::linear_thread() / (cuda_host::device.threads / size_t(cluster)));
}

inline unsigned char* at(uint32_t address, uint32_t bytes, const char* what, int of = rank()) {
  const int64_t offset = int64_t(address) - kBase;
  const int64_t each = int64_t(cuda_host::device.shared_bytes) / cluster;
  if (offset < 0 || offset + bytes > each)
    cuda_host::fail_here("a shared address outside the block's memory", {what, "", 0});
  return cuda_host::dynamic_shared() + of * each + offset;
}

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// --- barriers ------------------------------------------------------------------------------------

struct Barrier {
  uint32_t phase : 1, pending : 15, count : 15, unset : 1;
  int32_t bytes;
};
static_assert(sizeof(Barrier) == 8, "the size of an mbarrier");

inline Barrier& barrier_at(uint32_t address, const char* what, int of = rank(),
                           bool fresh = false) {
  auto& barrier = *reinterpret_cast<Barrier*>(at(address, 8, what, of));
  if (address % 8) cuda_host::fail_here("a barrier that is not 8-byte aligned", {what, "", 0});
  // shared memory starts as all ones
  if (!fresh && barrier.unset) cuda_host::fail_here("a barrier without init", {what, "", 0});
  return barrier;
}

inline void settle_phase(Barrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.count;
}

inline void arrive(uint32_t address, uint32_t bytes, const char* what, int of = rank()) {
  Barrier& barrier = barrier_at(address, what, of);
  if (!barrier.pending)
    cuda_host::fail_here("more arrivals than the barrier counts", {what, "", 0});
  barrier.bytes += int32_t(bytes);
  --barrier.pending;
  settle_phase(barrier);
}

}  // namespace host

// --- tensor copies -------------------------------------------------------------------------------

struct TensorMap {
  const unsigned char* base;
  uint64_t columns, rows, planes, row_stride, plane_stride;
  uint32_t box_rows;
};

inline cudaError_t encode(TensorMap* map, Element, const void* base, uint64_t columns,
                          uint64_t rows, uint64_t planes, uint64_t row_stride,
                          uint64_t plane_stride, uint32_t box_rows) {
  // what cuTensorMapEncodeTiled refuses
  const uint64_t size = uint64_t(1) << 32, stride = uint64_t(1) << 40;
  const bool ok = reinterpret_cast<uintptr_t>(base) % 16 == 0 && columns && rows && planes &&
                  columns <= size && rows <= size && planes <= size && row_stride % 16 == 0 &&
                  plane_stride % 16 == 0 && row_stride < stride && plane_stride < stride &&
                  plane_stride % row_stride == 0 && box_rows && box_rows <= 256;
  if (!ok) return cudaErrorInvalidValue;
  *map = {static_cast<const unsigned char*>(base),
          columns,
          rows,
          planes,
          row_stride,
          plane_stride,
          box_rows};
  return cudaSuccess;
}

namespace host {

struct Copy {
  uint32_t to, barrier;
  int rank;
  TensorMap map;
  int64_t column, row, plane;
};

inline std::vector<Copy> copies;

inline void write(const Copy& copy) {
  const TensorMap& map = copy.map;
  for (int64_t r = 0; r < map.box_rows; ++r)
    for (int64_t c = 0; c < kRowBytes / 2; ++c) {
      const int64_t column = copy.column + c, row = copy.row + r;
      const bool inside = column >= 0 && column < int64_t(map.columns) && row >= 0 &&
                          row < int64_t(map.rows) && copy.plane >= 0 &&
                          copy.plane < int64_t(map.planes);
      uint16_t bits = 0;
      if (inside)
        memcpy(&bits, map.base + copy.plane * map.plane_stride + row * map.row_stride + 2 * column,
               2);
      memcpy(at(swizzled(copy.to + uint32_t(r * kRowBytes + 2 * c)), 2, "copy", copy.rank), &bits,
             2);
    }
  Barrier& barrier = barrier_at(copy.barrier, "copy", copy.rank);
  barrier.bytes -= int32_t(map.box_rows) * kRowBytes;
  settle_phase(barrier);
}

// lets copies arrive: all, or in the random order some
inline void deliver() {
  using cuda_host::Order;
  for (size_t i = 0; i < copies.size();) {
    cuda_host::device.current->progressed = true;
    if (cuda_host::device.order == Order::random && cuda_host::next_random() % 4) {
      ++i;
      continue;
    }
    const Copy copy = copies[i];
    copies.erase(copies.begin() + ptrdiff_t(i));
    write(copy);
  }
}

}  // namespace host
}  // namespace liar::hopper

#include "hopper_wgmma.h"

namespace liar::hopper {

// --- the interface of hopper.cuh -----------------------------------------------------------------

inline uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer)) + host::kBase;
}

inline void barrier_init(uint32_t barrier, uint32_t count) {
  // before the first barrier of a block nothing can be in flight
  host::copies.clear();
  host::forget_wgmmas();
  host::barrier_at(barrier, "barrier_init", host::rank(), true) = {0, count, count, 0, 0};
}

inline void barrier_init_fence() {}

inline void barrier_arrive(uint32_t barrier) { host::arrive(barrier, 0, "barrier_arrive"); }

inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  host::arrive(barrier, bytes, "barrier_expect");
}

inline void barrier_wait(uint32_t barrier, uint32_t parity, CUDA_HOST_SITE) {
  cuda_host::wait_until({"barrier_wait", file, line}, [&] {
    host::deliver();
    return host::barrier_at(barrier, "barrier_wait").phase != parity;
  });
}

inline void prefetch(const TensorMap*) {}

inline void load_all(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row,
                     int plane, uint32_t blocks) {
  if (to % 128) cuda_host::fail_here("a copy to an unaligned address", {"load", "", 0});
  if (!blocks || blocks >> host::cluster)
    cuda_host::fail_here("a copy to a block outside the cluster", {"load", "", 0});
  for (int rank = 0; rank < host::cluster; ++rank)
    if (blocks >> rank & 1) host::copies.push_back({to, barrier, rank, *map, column, row, plane});
  if (cuda_host::device.order == cuda_host::Order::forward) host::deliver();
}

inline void load(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row,
                 int plane) {
  load_all(to, map, barrier, column, row, plane, 1u << host::rank());
}

inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  if (int(rank) >= host::cluster)
    cuda_host::fail_here("a rank outside the cluster", {"barrier_arrive_at", "", 0});
  host::arrive(barrier, 0, "barrier_arrive_at", int(rank));
}

template <int kBlocks>
int cluster_rank() {
  return host::rank();
}
template <int kBlocks>
int cluster_index() {
  return int(blockIdx.x);
}
template <int kBlocks>
int cluster_count() {
  return int(gridDim.x);
}
template <int kBlocks>
void cluster_sync(CUDA_HOST_SITE) {
  __syncthreads(file, line);
}

template <int kBlocks, typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int count, int threads, int shared_bytes,
                            void* stream, Arguments&&... arguments) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  // a block of the emulator may have what all of the cluster have
  const int limit = cuda_host::device.shared_limit;
  cuda_host::device.shared_limit = kBlocks * limit;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBlocks * shared_bytes);
  cuda_host::device.shared_limit = limit;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(count));
  config.blockDim = dim3(unsigned(kBlocks * threads));
  config.dynamicSmemBytes = size_t(kBlocks) * size_t(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  host::cluster = kBlocks;
  error = cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
  host::cluster = 1;
  return error;
}

template <int kRegisters>
inline void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

template <int kRegisters>
inline void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

inline void add(float* to, float value) { *to += value; }

inline void add(float* to, float first, float second) {
  if (reinterpret_cast<uintptr_t>(to) % 8) cuda_host::fail_here("unaligned", {"add", "", 0});
  to[0] += first;
  to[1] += second;
}

inline uint4 read16(uint32_t address) {
  uint4 words;
  memcpy(&words, host::at(address, 16, "read16"), 16);
  return words;
}

inline uint32_t pack_bf16(float low, float high) {
  const auto rounded = [](float x) -> uint32_t {
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  };
  return rounded(high) << 16 | rounded(low);
}

inline float half_to_float(uint32_t bits) { return host::f16_value(bits); }

}  // namespace liar::hopper

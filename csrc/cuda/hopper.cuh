// one small function per Hopper primitive: transaction barriers, bulk tensor copies, warpgroup
// multiplication, register reallocation. Names of PTX instructions are in the comments; what each
// means is in the PTX ISA. A host compiler gets the same functions from hopper_host.h, where the
// tests emulate them.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

namespace liar::hopper {

enum class Element { bf16, f16 };

// bytes of one row of a swizzled tile: 64 elements of 16 bits
constexpr int kRowBytes = 128;

// the byte pattern of a 128-byte swizzle repeats every 8 rows: tiles start at multiples of this
constexpr int kSwizzleBytes = 1024;

// what a wgmma reads from shared memory, for a 16-bit operand whose non-contracted index is
// contiguous ("MN-major", the transposed form of the instruction), in tiles as a tensor copy with
// 128-byte swizzle writes them: columns in chunks of 64, each chunk `tokens` rows of 128 bytes.
//   bits  0-13  start address / 16        bits 16-29  bytes from one chunk to the next / 16
//   bits 32-45  bytes from 8 rows to the next 8 / 16  bits 62-63  1: 128-byte swizzle
// 16 tokens further is 2048 bytes further: a multiple of the pattern, so bits 49-51 (the phase of
// the pattern at the start) stay 0.
//
// checked against the canonical layout of the PTX ISA and of CUTLASS' make_gmma_desc<Major::MN>
// (B128: ((8,n),(8,k)) with strides ((1,LBO),(8,SBO)) in units of 16 bytes), and, in
// tests/cuda/test_gram_sm90.py, against the constants that Triton compiles for the same tiles.
__host__ __device__ constexpr uint64_t descriptor(uint32_t address, uint32_t chunk_bytes) {
  return uint64_t(1) << 62 | uint64_t(8 * kRowBytes / 16) << 32 | uint64_t(chunk_bytes / 16) << 16 |
         (address & 0x3FFFF) / 16;
}

// added to a descriptor, moves it by that many bytes
__host__ __device__ constexpr uint64_t descriptor_offset(uint32_t bytes) { return bytes / 16; }

}  // namespace liar::hopper

#if defined(LIAR_CUDA_HOST)
#include "hopper_host.h"
#else

#include <cuda.h>

namespace liar::hopper {

// --- on the host: tensor maps --------------------------------------------------------------------

using TensorMap = CUtensorMap;

// maps (planes, rows, columns) of 16-bit elements, strides in bytes, to boxes of (1, box_rows, 64)
// with 128-byte swizzle; what lies outside reads as zero
inline cudaError_t encode(TensorMap* map, Element element, const void* base, uint64_t columns,
                          uint64_t rows, uint64_t planes, uint64_t row_stride,
                          uint64_t plane_stride, uint32_t box_rows) {
  // asked of the runtime: linking libcuda would make the module need a driver to be imported
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const auto tiled = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  const cuuint64_t sizes[] = {columns, rows, planes};
  const cuuint64_t strides[] = {row_stride, plane_stride};
  const cuuint32_t box[] = {kRowBytes / 2, box_rows, 1};
  const cuuint32_t steps[] = {1, 1, 1};
  const CUresult result = tiled(
      map,
      element == Element::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      3, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// `count` clusters of kBlocks blocks
template <int kBlocks, typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int count, int threads, int shared_bytes,
                            void* stream, Arguments&&... arguments) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or a later, unrelated check would find it
    return error;
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kBlocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(count * kBlocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = kBlocks > 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
}

// --- on the device -------------------------------------------------------------------------------

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LIAR_HOPPER_CODE 1

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// mbarrier: a phase ends when `count` arrivals and all announced bytes are in
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// makes initialised barriers visible to the copy engine; a block barrier must follow
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// arrives, and announces the bytes that copies will bring within this phase
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}

// until the phase of this parity has ended; on a fresh barrier parity 1 has
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

__device__ __forceinline__ void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// one box to shared memory; its bytes count on the barrier
__device__ __forceinline__ void load(uint32_t to, const TensorMap* map, uint32_t barrier,
                                     int column, int row, int plane) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(plane)
      : "memory");
}

// the same to every block of the cluster, at the same addresses, counted on each one's barrier
__device__ __forceinline__ void load_all(uint32_t to, const TensorMap* map, uint32_t barrier,
                                         int column, int row, int plane, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(plane), "h"(blocks)
      : "memory");
}

// arrives at a barrier of another block of the cluster, by its address in this block. A release at
// the scope of the cluster would be a fence for all of memory (MEMBAR.ALL.GPU) and is not needed:
// what the arrival tells is that reads of shared memory are over, and their results are in
// registers
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

template <int kBlocks>
__device__ __forceinline__ int cluster_rank() {
  if constexpr (kBlocks == 1) return 0;
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}

// of how many clusters this is which
template <int kBlocks>
__device__ __forceinline__ int cluster_index() {
  return int(blockIdx.x) / kBlocks;
}
template <int kBlocks>
__device__ __forceinline__ int cluster_count() {
  return int(gridDim.x) / kBlocks;
}

// every thread of the cluster waits for every other
template <int kBlocks>
__device__ __forceinline__ void cluster_sync() {
  if constexpr (kBlocks == 1)
    __syncthreads();
  else
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// orders what was written to accumulator registers before the wgmmas that follow
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// until at most `kPending` committed groups are unfinished
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// keeps the compiler from moving uses of the accumulators over the wait before it
template <int kCount>
__device__ __forceinline__ void settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define LIAR_D8(i)                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define LIAR_D64(i)                                                                               \
  LIAR_D8(i), LIAR_D8(i + 8), LIAR_D8(i + 16), LIAR_D8(i + 24), LIAR_D8(i + 32), LIAR_D8(i + 40), \
      LIAR_D8(i + 48), LIAR_D8(i + 56)
#define LIAR_0_63                                                                                  \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
  "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,"   \
  "%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LIAR_64_127                                                                               \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86," \
  "%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,"  \
  "%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,"    \
  "%126,%127"
// the trailing ones: accumulate, plus both signs, both operands transposed
#define LIAR_WGMMA_128(type)                                                               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" LIAR_0_63 \
               "}, %64, %65, 1, 1, 1, 1, 1;"                                               \
               : LIAR_D64(0)                                                               \
               : "l"(a), "l"(b))
#define LIAR_WGMMA_256(type)                                                \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type \
               " {" LIAR_0_63 LIAR_64_127 "}, %128, %129, 1, 1, 1, 1, 1;"   \
               : LIAR_D64(0), LIAR_D64(64)                                  \
               : "l"(a), "l"(b))

// D += Aᵀ B over 16 tokens, by the 128 threads of a warpgroup, asynchronously. D is 64 × 2 kCount:
// thread t holds rows 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), columns 8 (i / 4) + 2 (t % 4) + i %
// 2
template <Element kElement, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], uint64_t a, uint64_t b) {
  static_assert(kCount == 64 || kCount == 128, "128 or 256 columns");
  if constexpr (kCount == 64 && kElement == Element::bf16) LIAR_WGMMA_128("bf16");
  if constexpr (kCount == 64 && kElement == Element::f16) LIAR_WGMMA_128("f16");
  if constexpr (kCount == 128 && kElement == Element::bf16) LIAR_WGMMA_256("bf16");
  if constexpr (kCount == 128 && kElement == Element::f16) LIAR_WGMMA_256("f16");
}

#undef LIAR_WGMMA_256
#undef LIAR_WGMMA_128
#undef LIAR_64_127
#undef LIAR_0_63
#undef LIAR_D64
#undef LIAR_D8

// red: an addition in the L2 cache, rounded to nearest (subnormal values count as zero), that
// nobody waits for
__device__ __forceinline__ void add(float* to, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
}

// two neighbours at once, 8-byte aligned
__device__ __forceinline__ void add(float* to, float first, float second) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(first),
               "f"(second)
               : "memory");
}

// 16 bytes of shared memory by its 32-bit address
__device__ __forceinline__ uint4 read16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// two floats to two bfloat16, rounded to nearest even, `low` in the lower half
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float half_to_float(uint32_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(uint16_t(bits)));
  return value;
}

#endif  // sm_90a

}  // namespace liar::hopper

#endif  // a device

#if defined(LIAR_HOPPER_CODE)
namespace liar::hopper {

// the two 16-bit elements of a word as floats
template <Element kElement>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  if constexpr (kElement == Element::bf16)
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
  else
    return {half_to_float(word & 0xFFFF), half_to_float(word >> 16)};
}

}  // namespace liar::hopper
#endif

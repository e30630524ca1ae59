// G += Xᵀ X[:, :panel] on and below the diagonal and sum += Σ x, for Hopper: wgmma on tiles that
// tensor copies bring, one persistent block per multiprocessor.
//
// A block has three warpgroups. In the first, warp 0 keeps a ring of stages filled (a stage: 64
// tokens of the 128 columns of x that become rows of G, and of the 256 or 128 that become columns),
// and warps 2 and 3 add up columns of x from shared memory where a tile lies in column 0 of G:
// every row of tiles has exactly one of those. The other two warpgroups multiply, 64 rows of the
// tile each. Both operands are read from shared memory as they lie in x, tokens outermost: the
// transposed form of wgmma, so nothing is transposed or packed.
//
// Two blocks can work as a cluster, one row of tiles each: both need the same 256 columns of x, so
// each loads half of them for both, which takes a third off what is read from the L2 cache. A stage
// is then free when the readers of both blocks have given it back.
//
// With three planes x is the split h + m + l of float32 data into bfloat16, and the six products
// that matter are added, the small ones first: hh, hm, mh, hl, lh, mm.
#pragma once
#include "gram_sums.cuh"
#include "launch.cuh"

namespace liar::gram {
namespace {

#if defined(LIAR_HOPPER_CODE)

// stages are used in turn; a barrier's phase flips once per round
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// addresses of the ring in shared memory
template <typename S>
struct Pipe {
  uint32_t data;
  __device__ __forceinline__ uint32_t stage(int i) const { return data + i * S::kStage; }
  __device__ __forceinline__ uint32_t full(int i) const {
    return data + S::kStages * S::kStage + 8 * i;
  }
  __device__ __forceinline__ uint32_t empty(int i) const { return full(S::kStages + i); }
};

// gives a stage back to everyone who fills it
template <int kCluster>
__device__ __forceinline__ void release(uint32_t empty, int lane) {
  if constexpr (kCluster == 1) {
    if (lane == 0) hopper::barrier_arrive(empty);
  } else {
    if (lane < kCluster) hopper::barrier_arrive_at(empty, uint32_t(lane));
  }
}

template <typename S, int kTileColumns, int kPlanes, int kCluster>
__device__ inline void load_tiles(const Parameters& p, const Place place,
                                  const hopper::TensorMap* map, const Pipe<S> pipe) {
  constexpr int kShare = kTileColumns / kCluster;
  Ring<S::kStages> ring;
  for (int index = place.first; index < work_count(p.plan); index += place.stride) {
    const Work work = work_at<kCluster>(p.plan, index, place.rank);
    for (int step = work.begin; step < work.end; ++step, ring.next()) {
      const uint32_t full = pipe.full(ring.stage), left = pipe.stage(ring.stage);
      const uint32_t right = left + kPlanes * S::kLeft + place.rank * (kShare / 64) * S::kChunk;
      const int row = work.tile.row * kTileRows, token = step * S::kDepth;
      const int column = work.tile.column * kTileColumns + place.rank * kShare;
      hopper::barrier_wait(pipe.empty(ring.stage), ring.phase ^ 1);
      hopper::barrier_expect(full, S::kStage);
      for (int plane = 0; plane < kPlanes; ++plane)
        for (int c = 0; c < kTileRows / 64; ++c)
          hopper::load(left + plane * S::kLeft + c * S::kChunk, map, full, row + 64 * c, token,
                       plane);
      for (int plane = 0; plane < kPlanes; ++plane)
        for (int c = 0; c < kShare / 64; ++c) {
          const uint32_t to = right + plane * S::kRight + c * S::kChunk;
          if constexpr (kCluster == 1)
            hopper::load(to, map, full, column + 64 * c, token, plane);
          else
            hopper::load_all(to, map, full, column + 64 * c, token, plane, (1 << kCluster) - 1);
        }
    }
  }
}

// one warp per 64 columns: a lane adds 8 columns of every fourth token, a stage in float, stages in
// double
template <typename S, Element kElement, int kPlanes, int kCluster>
__device__ inline void add_columns(const Parameters& p, const Place place, const Pipe<S> pipe,
                                   int half) {
  const int lane = threadIdx.x % 32, piece = lane % 8;
  Ring<S::kStages> ring;
  for (int index = place.first; index < work_count(p.plan); index += place.stride) {
    const Work work = work_at<kCluster>(p.plan, index, place.rank);
    const bool mine = work.tile.column == 0 && p.sum != nullptr;
    double total[8] = {};
    for (int step = work.begin; step < work.end; ++step, ring.next()) {
      hopper::barrier_wait(pipe.full(ring.stage), ring.phase);
      if (mine) {
        float part[8] = {};
        for (int plane = 0; plane < kPlanes; ++plane) {
          const uint32_t chunk = pipe.stage(ring.stage) + plane * S::kLeft + half * S::kChunk;
#pragma unroll 4
          for (int token = lane / 8; token < S::kDepth; token += 4) {
            // the swizzle exchanges the 16-byte pieces of a row by its index in the pattern
            const uint4 words =
                hopper::read16(chunk + token * hopper::kRowBytes + (piece ^ token % 8) * 16);
            const uint32_t word[] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float2 pair = hopper::unpack<kElement>(word[i]);
              part[2 * i] += pair.x;
              part[2 * i + 1] += pair.y;
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) total[i] += double(part[i]);
      }
      __syncwarp();
      release<kCluster>(pipe.empty(ring.stage), lane);
    }
    if (!mine) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      total[i] += __shfl_xor_sync(~0u, total[i], 8);
      total[i] += __shfl_xor_sync(~0u, total[i], 16);
    }
    if (lane >= 8) continue;
    const int row = half * 64 + 8 * piece, column = work.tile.row * kTileRows + row;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (work.slot >= 0)
        p.partial_sum[int64_t(work.slot) * kTileRows + row + i] = total[i];
      else if (column + i < p.columns)
        p.sum[column + i] += total[i];
    }
  }
}

template <typename S, Element kElement, int kPlanes, int kCluster>
__device__ inline void multiply(const Parameters& p, const Place place, const Pipe<S> pipe,
                                int group) {
  const int thread = threadIdx.x % kThreads - kWarpgroup;
  const int lane = threadIdx.x % 32;
  Ring<S::kStages> ring;
  for (int index = place.first; index < work_count(p.plan); index += place.stride) {
    const Work work = work_at<kCluster>(p.plan, index, place.rank);
    float low[S::kAccumulators] = {};
    uint32_t high[S::kAccumulators / 2] = {};
    // half a period apart, so that one group multiplies while the other moves its sum
    int until = work.begin + (group == 0 ? p.period : (p.period + 1) / 2);
    for (int step = work.begin; step < work.end; until = step + p.period) {
      if (until > work.end) until = work.end;
      int used = -1;
      for (; step < until; ++step, ring.next()) {
        hopper::barrier_wait(pipe.full(ring.stage), ring.phase);
        const uint32_t left = pipe.stage(ring.stage) + group * S::kChunk;
        const uint32_t right = pipe.stage(ring.stage) + kPlanes * S::kLeft;
        const uint64_t a = hopper::descriptor(left, S::kChunk);
        const uint64_t b = hopper::descriptor(right, S::kChunk);
        hopper::wgmma_fence();
#pragma unroll
        for (int i = 0; i < products(kPlanes); ++i) {
#pragma unroll
          for (int token = 0; token < S::kDepth; token += 16)
            hopper::wgmma<kElement>(
                low,
                a + hopper::descriptor_offset(left_plane(kPlanes, i) * S::kLeft +
                                              token * hopper::kRowBytes),
                b + hopper::descriptor_offset(right_plane(kPlanes, i) * S::kRight +
                                              token * hopper::kRowBytes));
        }
        hopper::wgmma_commit();
        hopper::wgmma_wait<1>();
        // the stage before this one has been read
        if (used >= 0) release<kCluster>(pipe.empty(used), lane);
        used = ring.stage;
      }
      hopper::wgmma_wait<0>();
      hopper::settle(low);
      release<kCluster>(pipe.empty(used), lane);
      if (step < work.end) promote(low, high);
    }
    store_tile(p, work, thread, low, high);
  }
}

#endif  // LIAR_HOPPER_CODE

template <Element kElement, int kTileColumns, int kPlanes, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    gram_kernel(const __grid_constant__ hopper::TensorMap map, const Parameters p) {
#if defined(LIAR_HOPPER_CODE)
  using S = Shape<kTileColumns, kPlanes>;
  LIAR_DYNAMIC_SHARED(shared);
  const uint32_t base = hopper::shared_address(shared);
  const uint32_t pattern = hopper::kSwizzleBytes;
  const Pipe<S> pipe{(base + pattern - 1) / pattern * pattern};
  const Place place{hopper::cluster_index<kCluster>(), hopper::cluster_count<kCluster>(),
                    hopper::cluster_rank<kCluster>()};
  // the remainder does nothing on a device, where a block has kThreads; under the emulator a block
  // holds a whole cluster
  const int thread = int(threadIdx.x) % kThreads;
  // uniform over a warp, and the compiler knows
  const int warp = __shfl_sync(~0u, thread / 32, 0);
  if (thread == 0) {
    hopper::prefetch(&map);
    for (int i = 0; i < S::kStages; ++i) {
      hopper::barrier_init(pipe.full(i), 1);
      hopper::barrier_init(pipe.empty(i), kReaders * kCluster);
    }
    hopper::barrier_init_fence();
  }
  hopper::cluster_sync<kCluster>();
  if (warp < 4) {
    hopper::give_registers<kLoaderRegisters>();
    if (thread == 0) load_tiles<S, kTileColumns, kPlanes, kCluster>(p, place, &map, pipe);
    if (warp >= 2) add_columns<S, kElement, kPlanes, kCluster>(p, place, pipe, warp - 2);
  } else {
    hopper::take_registers<kMultiplierRegisters>();
    multiply<S, kElement, kPlanes, kCluster>(p, place, pipe, warp / 4 - 1);
  }
  // a block that has exited has no shared memory for the others to write to
  if constexpr (kCluster > 1) hopper::cluster_sync<kCluster>();
#endif
}

}  // namespace
}  // namespace liar::gram

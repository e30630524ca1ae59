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
// Long sums: a tensor core truncates its running sum, an error of one sign, about 2e-8 of the sum
// per 16 tokens where all products are positive, as on the diagonal. So every 384 tokens (24 wgmmas
// deep, 5e-7) the sum moves into a second accumulator by additions that round to nearest. There is
// no room for a second float per element: 64 × 256 of a warpgroup are 128 registers a thread, and
// 256 is more than a thread can have. The second accumulator is a bfloat16, two to a register:
//     t = high + low;  high' = bfloat16(t);  low' = low + (high - high')
// high - high' is a float, so nothing but the last bit of low' is rounded, and high + low together
// are worth 32 bits. low' lies within ±2⁻⁹ of the sum, with either sign, and the tensor core goes
// on from there. 128 + 64 registers, 11 instructions for two elements every 384 tokens; the two
// warpgroups do it half a period apart, so that the tensor cores always have work from one of them.
// A sum that overflows ends as NaN.
//
// Two blocks can work as a cluster, one row of tiles each: both need the same 256 columns of x, so
// each loads half of them for both, which takes a third off what is read from the L2 cache. A stage
// is then free when the readers of both blocks have given it back.
//
// With three planes x is the split h + m + l of float32 data into bfloat16, and the six products
// that matter are added, the small ones first: hh, hm, mh, hl, lh, mm.
#pragma once
#include "gram_tiles.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace liar::gram {
namespace {

using hopper::Element;

constexpr int kThreads = 384;  // one warpgroup that loads, two that multiply
constexpr int kWarpgroup = 128;
constexpr int kMultiplyThreads = 2 * kWarpgroup;
// per thread; multipliers hold 192 of them in accumulators
constexpr int kLoaderRegisters = 72;
constexpr int kMultiplierRegisters = 216;
static_assert(kWarpgroup * kLoaderRegisters + kMultiplyThreads * kMultiplierRegisters <= 65536,
              "the registers of a multiprocessor");
constexpr int kRingBytes = 216 * 1024;
// warps that give a stage back: 8 that multiply, 2 that add up columns
constexpr int kReaders = 10;

template <int kTileColumns, int kPlanes>
struct Shape {
  static constexpr int kDepth = kPlanes == 1 ? 64 : 32;      // tokens of a stage
  static constexpr int kChunk = kDepth * hopper::kRowBytes;  // 64 columns of one plane
  static constexpr int kLeft = kTileRows / 64 * kChunk;
  static constexpr int kRight = kTileColumns / 64 * kChunk;
  static constexpr int kStage = kPlanes * (kLeft + kRight);
  static constexpr int kStages = kRingBytes / kStage;
  static constexpr int kAccumulators = 64 * kTileColumns / kWarpgroup;
  // stages between two moves of the sum: 24 wgmmas, or 36 of which 30 add small products
  static constexpr int kPeriod = kPlanes == 1 ? 6 : 3;
  static constexpr int kShared = kStages * kStage + hopper::kSwizzleBytes + 16 * kStages;
};

// the planes of the i-th product: only hh, or mm, lh, hl, mh, hm, hh
__host__ __device__ constexpr int products(int planes) { return planes == 1 ? 1 : 6; }
__host__ __device__ constexpr int left_plane(int planes, int i) {
  return planes == 1 ? 0 : i == 0 || i == 3 ? 1 : i == 1 ? 2 : 0;
}
__host__ __device__ constexpr int right_plane(int planes, int i) {
  return planes == 1 ? 0 : i == 0 || i == 4 ? 1 : i == 2 ? 2 : 0;
}

struct Parameters {
  Plan plan;
  int columns, panel;
  int period;   // stages between two moves of the sum
  bool paired;  // rows of G are 8-byte aligned
  float* gram;
  int64_t gram_stride;
  double* sum;          // or NULL
  int cluster;          // blocks
  float* partial;       // (parts, rest, cluster) tiles as the multiplying threads hold them
  double* partial_sum;  // (parts, rest, cluster, 128)
};

// what a block does in one turn
struct Work {
  Tile tile;       // of the block
  int begin, end;  // stages
  int slot;        // of the workspace, or -1
};

// a block's place: which turns are its cluster's, and which rows of a tile its own
struct Place {
  int first, stride, rank;
};

__host__ __device__ inline int work_count(const Plan& plan) {
  return plan.whole + plan.rest * plan.parts;
}

#if defined(LIAR_HOPPER_CODE)

template <int kCluster>
__device__ inline Work work_at(const Plan& plan, int index, int rank) {
  Work work = {{}, 0, plan.steps, -1};
  if (index < plan.whole) {
    work.tile = tile_at(plan, index);
  } else {
    const int split = index - plan.whole, part = split / plan.rest;
    work = {tile_at(plan, plan.whole + split % plan.rest),
            int(int64_t(plan.steps) * part / plan.parts),
            int(int64_t(plan.steps) * (part + 1) / plan.parts), split * kCluster + rank};
  }
  work.tile.row = work.tile.row * kCluster + rank;
  return work;
}

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
      hopper::barrier_wait<kCluster>(pipe.empty(ring.stage), ring.phase ^ 1);
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

// moves the sum into `high`, as the head of this file says
template <int kCount>
__device__ __forceinline__ void promote(float (&low)[kCount], uint32_t (&high)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float2 old = hopper::unpack<Element::bf16>(high[i]);
    high[i] = hopper::pack_bf16(low[2 * i] + old.x, low[2 * i + 1] + old.y);
    const float2 now = hopper::unpack<Element::bf16>(high[i]);
    low[2 * i] += old.x - now.x;
    low[2 * i + 1] += old.y - now.y;
  }
}

// where in the tile a thread's accumulators lie: hopper::wgmma says how
struct Fragment {
  int row, column;
  __device__ __forceinline__ explicit Fragment(int thread)
      : row(thread / kWarpgroup * 64 + thread % kWarpgroup / 32 * 16 + thread % 32 / 4),
        column(thread % 4 * 2) {}
};

// entries (row, column), (row, column + 1) of G, where they exist on or below the diagonal
__device__ __forceinline__ void add_pair(const Parameters& p, int row, int column, float first,
                                         float second) {
  if (row >= p.columns) return;
  float* const to = p.gram + row * p.gram_stride + column;
  if (column < p.panel && column <= row) hopper::add(to, first);
  if (column + 1 < p.panel && column + 1 <= row) hopper::add(to + 1, second);
}

// the values of accumulators i to i + 3: a pair in one row, and the pair 8 rows below
template <int kCount>
__device__ __forceinline__ float4 whole(const float (&low)[kCount],
                                        const uint32_t (&high)[kCount / 2], int i) {
  const float2 a = hopper::unpack<Element::bf16>(high[i / 2]);
  const float2 b = hopper::unpack<Element::bf16>(high[i / 2 + 1]);
  return make_float4(low[i] + a.x, low[i + 1] + a.y, low[i + 2] + b.x, low[i + 3] + b.y);
}

template <int kCount>
__device__ __forceinline__ void store_tile(const Parameters& p, const Work& work, int thread,
                                           const float (&low)[kCount],
                                           const uint32_t (&high)[kCount / 2]) {
  constexpr int kTileColumns = 2 * kCount;
  if (work.slot >= 0) {
    float* const to = p.partial + (int64_t(work.slot) * kMultiplyThreads * kCount + 4 * thread);
#pragma unroll
    for (int i = 0; i < kCount; i += 4)
      *reinterpret_cast<float4*>(to + i * kMultiplyThreads) = whole(low, high, i);
    return;
  }
  const Fragment at(thread);
  const int row = work.tile.row * kTileRows + at.row;
  const int column = work.tile.column * kTileColumns + at.column;
  const int last_column = (work.tile.column + 1) * kTileColumns - 1;
  const bool inside = p.paired && (work.tile.row + 1) * kTileRows <= p.columns &&
                      last_column < p.panel && last_column <= work.tile.row * kTileRows;
  if (inside) {
    float* const top = p.gram + row * p.gram_stride + column;
    float* const bottom = top + 8 * p.gram_stride;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 value = whole(low, high, i);
      hopper::add(top + 2 * i, value.x, value.y);
      hopper::add(bottom + 2 * i, value.z, value.w);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 value = whole(low, high, i);
      add_pair(p, row, column + 2 * i, value.x, value.y);
      add_pair(p, row + 8, column + 2 * i, value.z, value.w);
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

// adds the parts of the split tiles to G, first part first; one block per tile of a block and 4
// accumulators
template <int kTileColumns>
__global__ void __launch_bounds__(kMultiplyThreads) add_parts_kernel(const Parameters p) {
#if defined(LIAR_HOPPER_CODE)
  constexpr int kCount = Shape<kTileColumns, 1>::kAccumulators;
  const int thread = threadIdx.x, i = 4 * blockIdx.x, slot = blockIdx.y;
  const int slots = p.plan.rest * p.cluster;  // of one part
  Tile tile = tile_at(p.plan, p.plan.whole + slot / p.cluster);
  tile.row = tile.row * p.cluster + slot % p.cluster;
  const float* from =
      p.partial + int64_t(slot) * kMultiplyThreads * kCount + i * kMultiplyThreads + 4 * thread;
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int part = 0; part < p.plan.parts; ++part) {
    const float4 more = *reinterpret_cast<const float4*>(from);
    total = make_float4(total.x + more.x, total.y + more.y, total.z + more.z, total.w + more.w);
    from += int64_t(slots) * kMultiplyThreads * kCount;
  }
  const Fragment at(thread);
  const int row = tile.row * kTileRows + at.row;
  const int column = tile.column * kTileColumns + at.column + 2 * i;
  add_pair(p, row, column, total.x, total.y);
  add_pair(p, row + 8, column, total.z, total.w);
  const int feature = tile.row * kTileRows + thread;
  if (i > 0 || tile.column > 0 || p.sum == nullptr || thread >= kTileRows || feature >= p.columns)
    return;
  double sum = 0.0;
  for (int part = 0; part < p.plan.parts; ++part)
    sum += p.partial_sum[(int64_t(part) * slots + slot) * kTileRows + thread];
  p.sum[feature] += sum;
#endif
}

}  // namespace
}  // namespace liar::gram

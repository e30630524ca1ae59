// what the parts of the Hopper Gram kernel agree on: tile and stage sizes, parameters, and which
// tile a block works on when
#pragma once
#include "gram_tiles.cuh"
#include "hopper.cuh"

namespace liar::gram {
namespace {

using hopper::Element;

constexpr int kThreads = 384;  // one warpgroup that loads, two that multiply
constexpr int kWarpgroup = 128;
constexpr int kMultiplyThreads = 2 * kWarpgroup;
// per thread; multipliers hold 192 of them in accumulators. With 208 and with 56 something spills
// (nvcc 13.0). A block starts with 168 for each of its threads, the most that fit a multiprocessor,
// and only moves them: asking for more than that would wait for ever
constexpr int kLoaderRegisters = 72;
constexpr int kMultiplierRegisters = 216;
constexpr int kEntryRegisters = 65536 / kThreads / 8 * 8;
static_assert(kWarpgroup * kLoaderRegisters + kMultiplyThreads * kMultiplierRegisters <=
              kThreads * kEntryRegisters);
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

#endif

}  // namespace
}  // namespace liar::gram

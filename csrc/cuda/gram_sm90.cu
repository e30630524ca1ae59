// launches the Hopper Gram kernels of gram_sm90.cuh: which tiles, on which device, with which
// tensor map
#include "../liar.h"
#include "gram_sm90.cuh"

namespace liar::gram {
namespace {

struct Choice {
  Plan plan;
  int tile_columns, cluster, teams;
  int64_t partial_bytes, workspace_bytes;
};

// relative to its share of the multiplications, a tile of 128 columns reads 4/3 of the bytes and
// does twice the epilogues: an estimate, until both were timed
constexpr double kNarrowCost = 1.15;

cudaError_t choose(const LiarGramSm90& args, Choice* choice) {
  const bool planes_ok =
      args.planes == 1 ? args.dtype != LIAR_F32 : args.planes == 3 && args.dtype == LIAR_BF16;
  const int64_t most = (int64_t(1) << 31) - 1;
  const bool sizes_ok = args.tokens >= 0 && args.tokens <= most && args.columns >= 0 &&
                        args.columns <= (int64_t(1) << 21) && args.panel >= 0 &&
                        args.panel <= args.columns && args.row_stride > 0 &&
                        args.row_stride >= args.columns && args.row_stride % 8 == 0 &&
                        (args.planes == 1 || args.plane_stride % args.row_stride == 0);
  const bool tile_ok = (args.tile == 0 || args.tile == 128 || args.tile == 256) &&
                       args.cluster >= 0 && args.cluster <= 2 &&
                       !(args.cluster == 2 && args.tile == 128);
  if (!planes_ok || !sizes_ok || !tile_ok || reinterpret_cast<uintptr_t>(args.x) % 16)
    return cudaErrorInvalidValue;
  int device = 0, major = 0, minor = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  // the code is for sm_90a, which no later architecture runs
  if (major != 9 || minor != 0) return cudaErrorNoKernelImageForDevice;
  const int blocks = args.blocks > 0 && args.blocks < processors ? args.blocks : processors;
  const int depth = args.planes == 1 ? Shape<256, 1>::kDepth : Shape<256, 3>::kDepth;
  choice->cluster = args.cluster == 2 && blocks >= 2 ? 2 : 1;
  const auto plan = [&](int cluster, int tile_columns) {
    return make_plan(args.columns, args.panel, args.tokens, cluster * kTileRows, tile_columns,
                     depth, blocks / cluster);
  };
  const Plan wide = plan(choice->cluster, 256), narrow = plan(1, 128);
  const bool prefer_wide =
      2 * turns(wide, blocks / choice->cluster) <= kNarrowCost * turns(narrow, blocks);
  choice->tile_columns =
      args.tile == 128 || (args.tile + args.cluster == 0 && !prefer_wide) ? 128 : 256;
  choice->plan = choice->tile_columns == 256 ? wide : narrow;
  const int teams = blocks / choice->cluster;
  choice->teams = teams < work_count(choice->plan) ? teams : work_count(choice->plan);
  const int64_t slots = int64_t(choice->plan.rest) * choice->plan.parts * choice->cluster;
  choice->partial_bytes = slots * kTileRows * choice->tile_columns * int64_t(sizeof(float));
  choice->workspace_bytes = choice->partial_bytes + slots * kTileRows * int64_t(sizeof(double));
  return cudaSuccess;
}

template <Element kElement, int kTileColumns, int kPlanes, int kCluster>
cudaError_t launch(const LiarGramSm90& args, const Choice& choice, Parameters p) {
  using S = Shape<kTileColumns, kPlanes>;
  // products of float16 have 22 bits, and more of them is lost when they are aligned to the sum
  const int period = kElement == Element::f16 ? S::kPeriod / 2 : S::kPeriod;
  p.period = args.period > 0 ? args.period : period;
  hopper::TensorMap map;
  const uint64_t row = 2 * uint64_t(args.row_stride);
  cudaError_t error =
      hopper::encode(&map, kElement, args.x, uint64_t(args.columns), uint64_t(args.tokens), kPlanes,
                     row, kPlanes == 1 ? row : 2 * uint64_t(args.plane_stride), S::kDepth);
  if (error != cudaSuccess) return error;
  error =
      hopper::launch_clusters<kCluster>(gram_kernel<kElement, kTileColumns, kPlanes, kCluster>,
                                        choice.teams, kThreads, S::kShared, args.stream, map, p);
  if (error != cudaSuccess || choice.plan.rest == 0) return error;
  return liar_launch(add_parts_kernel<kTileColumns>,
                     dim3(S::kAccumulators / 4, unsigned(choice.plan.rest * kCluster)),
                     dim3(kMultiplyThreads), 0, args.stream, p);
}

template <int kTileColumns, int kCluster>
cudaError_t launch(const LiarGramSm90& args, const Choice& choice, const Parameters& p) {
  if (args.planes == 3) return launch<Element::bf16, kTileColumns, 3, kCluster>(args, choice, p);
  if (args.dtype == LIAR_F16)
    return launch<Element::f16, kTileColumns, 1, kCluster>(args, choice, p);
  return launch<Element::bf16, kTileColumns, 1, kCluster>(args, choice, p);
}

}  // namespace
}  // namespace liar::gram

extern "C" int liar_gram_sm90_workspace(const LiarGramSm90* args, int64_t* bytes) {
  liar::gram::Choice choice{};
  const cudaError_t error = liar::gram::choose(*args, &choice);
  *bytes = choice.workspace_bytes;
  return int(error);
}

extern "C" int liar_gram_sm90(const LiarGramSm90* args) {
  using namespace liar::gram;
  Choice choice{};
  const cudaError_t error = choose(*args, &choice);
  if (error != cudaSuccess) return int(error);
  if (args->tokens == 0 || args->panel == 0) return int(cudaSuccess);
  if (args->workspace_bytes < choice.workspace_bytes) return int(cudaErrorInvalidValue);
  Parameters p{};
  p.plan = choice.plan;
  p.columns = int(args->columns);
  p.panel = int(args->panel);
  p.paired = reinterpret_cast<uintptr_t>(args->gram) % 8 == 0 && args->gram_stride % 2 == 0;
  p.gram = args->gram;
  p.gram_stride = args->gram_stride;
  p.sum = args->sum;
  p.cluster = choice.cluster;
  p.partial = static_cast<float*>(args->workspace);
  p.partial_sum =
      reinterpret_cast<double*>(static_cast<char*>(args->workspace) + choice.partial_bytes);
  if (choice.tile_columns == 128) return int(launch<128, 1>(*args, choice, p));
  return int(choice.cluster == 2 ? launch<256, 2>(*args, choice, p)
                                 : launch<256, 1>(*args, choice, p));
}

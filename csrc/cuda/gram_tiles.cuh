// which tiles of G exist, in which order they are computed, and by how many blocks each.
//
// A tile is what a team computes at once: a block its 128 × 128 or 128 × 256 entries, a cluster of
// two blocks 256 × 256. Row i of tiles has the columns that reach its part of the lower triangle,
// at most those of the panel: first a triangle, then a rectangle. The order is by groups of 2048
// rows of G, column by column inside a group, so that the tiles that are computed at the same time
// read few different columns of x: 132 tiles of 128 × 256 read 16 row blocks and about 8 column
// blocks, 2 × 2048 columns, whatever n is.
//
// Teams take tiles in turn. What is left for the last turn and would fill less than half of the
// teams is split over the tokens; the parts go to a workspace and a second kernel adds them up in a
// fixed order.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

namespace liar::gram {

// of one block
constexpr int kTileRows = 128;
constexpr int kGroupRows = 2048;

// tokens that a part of a split tile has at least: less is not worth writing a partial tile
constexpr int kSplitTokens = 512;

struct Plan {
  int row_tiles;      // ceil(n / tile rows)
  int column_tiles;   // ceil(panel / tile columns)
  int rows_per_step;  // row tiles per column tile on the diagonal: tile columns / tile rows
  int group;          // row tiles
  int steps;          // pipeline stages that the tokens take
  int whole;          // tiles that one team computes over all tokens
  int rest;           // tiles that are split
  int parts;          // teams per split tile
};

struct Tile {
  int row, column;
};

// tiles in the rows before `row`
__host__ __device__ inline int tiles_before(const Plan& plan, int row) {
  const int edge = plan.rows_per_step * plan.column_tiles;
  const int inside = row < edge ? row : edge;
  const int full = inside / plan.rows_per_step, more = inside % plan.rows_per_step;
  return plan.rows_per_step * (full * (full + 1) / 2) + more * (full + 1) +
         (row - inside) * plan.column_tiles;
}

__host__ __device__ inline Tile tile_at(const Plan& plan, int index) {
  int low = 0, high = (plan.row_tiles - 1) / plan.group;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (tiles_before(plan, middle * plan.group) <= index)
      low = middle;
    else
      high = middle - 1;
  }
  const int first = low * plan.group;
  const int rows = plan.row_tiles - first < plan.group ? plan.row_tiles - first : plan.group;
  index -= tiles_before(plan, first);
  // columns that every row of the group has; the diagonal cuts the later ones
  const int reach = first / plan.rows_per_step + 1;
  const int full = reach < plan.column_tiles ? reach : plan.column_tiles;
  if (index < full * rows) return {first + index % rows, index / rows};
  index -= full * rows;
  int column = full;
  for (;; ++column) {
    const int has = first + rows - plan.rows_per_step * column;
    if (index < has) break;
    index -= has;
  }
  return {plan.rows_per_step * column + index, column};
}

inline int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// the plan for that many teams; depth: tokens of a stage
inline Plan make_plan(int64_t columns, int64_t panel, int64_t tokens, int tile_rows,
                      int tile_columns, int depth, int teams) {
  Plan plan{};
  plan.row_tiles = ceil_div(columns, tile_rows);
  plan.column_tiles = ceil_div(panel, tile_columns);
  plan.rows_per_step = tile_columns / tile_rows;
  plan.group = kGroupRows / tile_rows;
  plan.steps = ceil_div(tokens, depth);
  const int tiles = tiles_before(plan, plan.row_tiles);
  const int rest = tiles % teams;
  const int64_t most = tokens / kSplitTokens;
  plan.parts = rest == 0 ? 1 : int(teams / rest < most ? teams / rest : most);
  if (plan.parts < 2) plan.parts = 1;
  plan.rest = plan.parts > 1 ? rest : 0;
  plan.whole = tiles - plan.rest;
  return plan;
}

// turns of all teams that a plan takes, a split one counted by its share of the tokens
inline double turns(const Plan& plan, int teams) {
  return ceil_div(plan.whole, teams) + (plan.rest ? 1.0 / plan.parts : 0.0);
}

}  // namespace liar::gram

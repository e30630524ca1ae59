// the tile list of csrc/cuda/gram_tiles.cuh, for the tests
#include "../../csrc/cuda/gram_tiles.cuh"

extern "C" {

// plan: row_tiles, column_tiles, rows_per_step, steps, whole, rest, parts; returns the tiles
int gram_tiles_plan(int64_t columns, int64_t panel, int64_t tokens, int rows, int tile, int depth,
                    int teams, int* plan) {
  const auto made = liar::gram::make_plan(columns, panel, tokens, rows, tile, depth, teams);
  const int fields[] = {made.row_tiles, made.column_tiles, made.rows_per_step, made.steps,
                        made.whole,     made.rest,         made.parts};
  for (int i = 0; i < 7; ++i) plan[i] = fields[i];
  return liar::gram::tiles_before(made, made.row_tiles);
}

// (row, column) of every tile in order
void gram_tiles_list(int64_t columns, int64_t panel, int rows, int tile, int* out) {
  const auto plan = liar::gram::make_plan(columns, panel, 1, rows, tile, 64, 1);
  const int count = liar::gram::tiles_before(plan, plan.row_tiles);
  for (int i = 0; i < count; ++i) {
    const auto at = liar::gram::tile_at(plan, i);
    out[2 * i] = at.row;
    out[2 * i + 1] = at.column;
  }
}
}

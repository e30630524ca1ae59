// packing: rows that the mask keeps, columns in the asked order, 48 at a time
#pragma once
#include <cstdint>

#include "../liar.h"

namespace liar {

// a run of tokens of X, already without the masked ones
struct Tokens {
  const LiarGram* args;
  int64_t first;  // position among the valid rows
  int64_t count;

  int64_t row(int64_t k) const { return args->valid ? args->valid[first + k] : first + k; }
};

// packed steps that `tokens` take: bf16 pairs hold two tokens each
inline int64_t packed_steps(int64_t tokens, bool pairs) {
  return pairs ? (tokens + 1) / 2 : tokens;
}

// writes panels [begin, end) of the packed copy: out[(panel * steps + k) * 48 + column]. columns
// past the last one and the odd half of the last pair are zero. the panels' column sums, fp64 all
// the way, are added to args->sum.
void pack_panels(const Tokens& tokens, int64_t begin, int64_t end, bool pairs, float* out);

// writes tokens as plain rows of `columns` elements, ordered: fp32, or the 16-bit input as it is.
// adds the column sums in the same way. rows [begin, end) of columns are handled by one caller.
void pack_rows(const Tokens& tokens, int64_t begin, int64_t end, bool widen, void* out);

}  // namespace liar

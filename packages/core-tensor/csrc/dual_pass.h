// What the forms of the dual pass share: its arguments, scratch memory, and the addition of a projected block.
#pragma once
#include <utility>
#include <vector>

#include "blocks.h"

namespace core_tensor {

enum Total { kCost, kSquare, kLeast, kFractional, kNonzero, kTotals };

template <class T>
struct Pass {
  const int64_t* offsets;
  const int32_t* index;  // (variables, rows_per_variable)
  const T* cost;
  const T* coefficient;  // same shape as index, or null for ones
  const double* lam;
  const T* anchor;       // proximal center, or null
  const double* shrink;  // factor per row applied to x, or null
  double* x_out;         // dense projection, or null
  double gamma;
  int64_t rows, rows_per_variable;
  Family<T> family;
};

constexpr int64_t kTile = 1024;  // variables whose reduced costs are formed at once: they stay in the first cache
constexpr int64_t kBlocks = 128;  // blocks of a tile at most
constexpr int64_t kPadded = kBlocks + 8;  // room for a whole vector

// The blocks of a tile between the loops over it: one array for each of their figures, read by vectors.
struct Tile {
  alignas(64) double least[kPadded], lowest[kPadded];  // of what is projected, and of the reduced costs themselves
  alignas(64) double cap[kPadded], reach[kPadded], x[kPadded];
  alignas(64) int64_t length[kPadded], found[kPadded], found_one[kPadded], other[kPadded];  // candidates: one bit each
  int32_t others[kPadded];
};

struct Scratch {
  Tile tile;
  std::vector<double> r, effective, x, dense;
  std::vector<int32_t> at;
  std::vector<std::pair<double, int32_t>> order;
  explicit Scratch(int64_t longest)
      : tile{},
        r(longest + 16),
        effective(longest + 16),
        x(longest + 1),
        dense(longest + 16),
        at(longest + 1),
        order(longest + 1) {}
};

template <class T>
inline double shrink_of(const Pass<T>& p, int64_t variable) {
  double factor = 1.0;
  for (int64_t i = 0; i < p.rows_per_variable; ++i) {
    const int64_t e = variable * p.rows_per_variable + i;
    if (!p.coefficient || p.coefficient[e] != T{0}) factor = std::min(factor, p.shrink[p.index[e]]);
  }
  return factor;
}

// Adds a projected block to the chunk's sums: sums[2 j] is row j of A x, sums[2 j + 1] the cost spent in row j.
template <class T>
inline void scatter(const Pass<T>& p, int64_t first, const Support& out, double* sums, double* totals) {
  for (int64_t i = 0; i < out.count; ++i) {
    const int64_t k = first + out.at[i];
    const double x = p.shrink ? out.x[i] * shrink_of(p, k) : out.x[i], spent = static_cast<double>(p.cost[k]) * x;
    totals[kCost] += spent;
    if (p.rows_per_variable == 1) {
      const int64_t j = p.index[k];
      sums[2 * j] += p.coefficient ? static_cast<double>(p.coefficient[k]) * x : x;
      sums[2 * j + 1] += spent;
    } else {
      for (int64_t e = k * p.rows_per_variable; e < (k + 1) * p.rows_per_variable; ++e)
        sums[2 * p.index[e]] += p.coefficient ? static_cast<double>(p.coefficient[e]) * x : x;
    }
    if (p.x_out) p.x_out[k] = x;
    if (!p.anchor) totals[kSquare] += x * x;
  }
  if (p.anchor) {  // ||x - x_prev||^2 = sum over all of x_prev^2, corrected where x is not zero
    for (int64_t i = 0; i < out.count; ++i) {
      const int64_t k = first + out.at[i];
      const double before = static_cast<double>(p.anchor[k]), x = p.shrink ? out.x[i] * shrink_of(p, k) : out.x[i];
      totals[kSquare] += x * (x - 2.0 * before);
    }
  }
  totals[kNonzero] += static_cast<double>(out.count);
}

// Adds one variable at amount x to its row, as `scatter` does for a support; the chunk's cost is the sum over its rows.
// `plain`: there is no anchor, no shrink and no primal to write.
template <bool plain, class T>
inline void scatter_one(const Pass<T>& p, int64_t k, double x, double* sums, double& square) {
  double* sum = sums + 2 * static_cast<int64_t>(p.index[k]);
  if (plain) {
    square += x * x;
  } else {
    if (p.shrink) x *= shrink_of(p, k);
    square += x * (p.anchor ? x - 2.0 * static_cast<double>(p.anchor[k]) : x);
    if (p.x_out) p.x_out[k] = x;
  }
  const double a = p.coefficient ? static_cast<double>(p.coefficient[k]) : 1.0, c = static_cast<double>(p.cost[k]);
  sum[0] += a * x;
  sum[1] += c * x;
}

// Blocks [block, stop) that make one tile: few enough for its arrays, and short enough for their reduced costs.
template <class T>
inline int64_t tile_end(const Pass<T>& p, int64_t block, int64_t end) {
  int64_t blocks = std::min(kBlocks, end - block);
  while (blocks > 1 && p.offsets[block + blocks] - p.offsets[block] > kTile) blocks /= 2;
  return block + blocks;
}

}  // namespace core_tensor

// Generalized Hessian of the smoothed dual: the sum over the blocks of A_i P_i A_i', P_i the derivative of the
// projection. Entries are added as 64-bit fixed-point numbers, so threads and ranks cannot change a result.
#include <cmath>
#include <vector>

#include "blocks.h"
#include "core.h"

namespace {

template <class T>
struct Curvature {
  const int64_t* offsets;
  const int32_t* index;
  const T* coefficient;  // null for ones
  const double* x;
  core_tensor::Family<T> family;
  int64_t rows, rows_per_variable;
  double scale;
};

// Sums of a thread. With a_i row i of A_F, P's entries sum to at most |a_i| |a_j| in size, whatever the order in which its
// two parts come: twice the greatest of `squares`, the sums of the |a_i|^2, bounds every sum that H ever holds.
struct Sums {
  int64_t* H;
  std::vector<double> squares;
};
constexpr double kLargest = 0x1p62;     // of the squares, so that H has room in 64 bits
constexpr double kLeastNorm = 0x1p-1000;  // of a cut's weights: the squares of smaller ones lose their digits

// Free entries of one block, 0 < x < u, and whether its cut is tight.
template <class T>
bool free_entries(const Curvature<T>& p, int64_t first, int64_t n, double cap, std::vector<int64_t>& free) {
  double total = 0.0;
  free.clear();
  for (int64_t k = first; k < first + n; ++k) {
    const double x = p.x[k];
    if (!(x > 0.0)) continue;
    const double w = p.family.weight ? static_cast<double>(p.family.weight[k]) : 1.0;
    const double u = p.family.upper ? static_cast<double>(p.family.upper[k * p.family.upper_stride])
                                    : core_tensor::kInfinity;
    total += w * x;
    if (x < u) free.push_back(k);
  }
  return p.family.equality || total >= cap * (1.0 - 1e-12);
}

// Adds the pairs of rows of variables k and l, and to `squares` those of a row with itself.
template <bool own, class T>
CT_INLINE void add(const Curvature<T>& p, int64_t k, int64_t l, double factor, int64_t* H, double* squares) {
  for (int64_t e = k * p.rows_per_variable; e < (k + 1) * p.rows_per_variable; ++e) {
    const double a = factor * (p.coefficient ? static_cast<double>(p.coefficient[e]) : 1.0);
    for (int64_t f = l * p.rows_per_variable; f < (l + 1) * p.rows_per_variable; ++f) {
      const double value = a * (p.coefficient ? static_cast<double>(p.coefficient[f]) : 1.0) * p.scale;
      int64_t& entry = H[p.index[e] * p.rows + p.index[f]];
      entry = wrapping_sum(entry, std::llrint(value));
      if (own && e == f) squares[p.index[e]] += value;
    }
  }
}

template <class T>
CT_CLONES bool block(const Curvature<T>& p, int64_t first, int64_t n, double cap, std::vector<int64_t>& free,
                     Sums& to) {
  const bool tight = free_entries(p, first, n, cap, free);
  if (free.empty() || (tight && free.size() == 1)) return true;  // a vertex: nothing moves
  double norm = 0.0;
  if (tight) {
    for (const int64_t k : free) {
      const double w = p.family.weight ? static_cast<double>(p.family.weight[k]) : 1.0;
      norm += w * w;
    }
  }
  int64_t* H = to.H;
  double* squares = to.squares.data();
  for (const int64_t k : free) {
    add<true>(p, k, k, 1.0, H, squares);
    if (!tight) continue;
    const double w = (p.family.weight ? static_cast<double>(p.family.weight[k]) : 1.0) / norm;
    for (const int64_t l : free)
      add<false>(p, k, l, -w * (p.family.weight ? static_cast<double>(p.family.weight[l]) : 1.0), H, squares);
  }
  return !tight || (norm >= kLeastNorm && norm < core_tensor::kInfinity);
}

template <class T>
int curvature(const Curvature<T>& p, int64_t blocks, int64_t* H, int threads) {
  std::vector<double> squares(p.rows);
  int refused = 0;
#pragma omp parallel num_threads(threads) reduction(| : refused)
  {
    std::vector<int64_t> free;
    std::vector<int64_t> mine(threads > 1 ? p.rows * p.rows : 0, 0);
    Sums to{threads > 1 ? mine.data() : H, std::vector<double>(p.rows)};
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const double cap = p.family.cap[b * p.family.cap_stride];
      refused |= !block(p, p.offsets[b], p.offsets[b + 1] - p.offsets[b], cap, free, to);
    }
#pragma omp critical
    {
      for (int64_t j = 0; j < static_cast<int64_t>(mine.size()); ++j) H[j] = wrapping_sum(H[j], mine[j]);
      for (int64_t i = 0; i < p.rows; ++i) squares[i] += to.squares[i];
    }
  }
  for (const double square : squares) refused |= !(square < kLargest);
  return !refused;
}

}  // namespace

// Returns 1, or 0 if an entry has no room in 64 bits.
#define CT_BLOCK_CURVATURE(NAME, T)                                                                                    \
  CT_EXPORT int NAME(const int64_t* offsets, const int32_t* index, const T* coefficient, const double* x,              \
                     const double* cap, const T* upper, const T* weight, int64_t* result, int64_t blocks,              \
                     int64_t rows, int64_t rows_per_variable, int64_t cap_stride, int64_t upper_stride,                \
                     double scale, int equality, int threads) {                                                        \
    const core_tensor::Family<T> family{cap, cap_stride, upper, upper_stride, weight, equality != 0};                  \
    const Curvature<T> p{offsets, index, coefficient, x, family, rows, rows_per_variable, scale};                      \
    return curvature<T>(p, blocks, result, threads);                                                                   \
  }
CT_BLOCK_CURVATURE(ct_block_curvature_f32, float)
CT_BLOCK_CURVATURE(ct_block_curvature_f64, double)

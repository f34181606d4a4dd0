// Squared norms of gradients that are known by their factors, g_j = L_j' R_j (see core_tensor/ghost_norms):
//
//   ||g_j||^2 = sum_ab (L_j L_j')_ab (R_j R_j' + beta)_ab.
//
// Both Gram matrices are symmetric, so only the tiles up to the diagonal are formed, and each is used up at once.
#include <vector>

#include "dots.h"

namespace {

template <class T>
struct Factors {
  const T *left, *right;  // (n, rows, width)
  int64_t rows, left_width, right_width;
  T bias;
};

// What rows i .. i + kHeight of one micro-batch add, entries left of the diagonal twice, since they stand above it too.
template <class T, int BYTES>
CT_INLINE double share_of(const Factors<T>& f, int64_t micro_batch, int64_t i) {
  using Tile = Dots<T, BYTES>;
  const T* left = f.left + micro_batch * f.rows * f.left_width;
  const T* right = f.right + micro_batch * f.rows * f.right_width;
  const int64_t end = std::min(i + kHeight, f.rows);
  Column<double> twice = {};
  for (int64_t j = 0; j < i; j += Tile::kWidth) {
    Column<T> g[Tile::kWidth] = {}, h[Tile::kWidth] = {};
    Tile::multiply(left, i, f.rows, left, j, i, f.left_width, g);
    Tile::multiply(right, i, f.rows, right, j, i, f.right_width, h);
#pragma GCC unroll 4
    for (int q = 0; q < Tile::kWidth; ++q)
      if (j + q < i)
        twice += __builtin_convertvector(g[q], Column<double>) * __builtin_convertvector(h[q] + f.bias, Column<double>);
  }
  Column<T> g[kHeight], h[kHeight];
  Tile::square(left, i, f.rows, f.left_width, g);
  Tile::square(right, i, f.rows, f.right_width, h);
  double total = 0.0;
  for (int64_t p = 0; p < end - i; ++p) {
    const auto entry = [&](int64_t q) CT_INLINE_LAMBDA {
      return static_cast<double>(g[q][p]) * static_cast<double>(h[q][p] + f.bias);
    };
    double left_of_it = twice[p];
    for (int64_t q = 0; q < p; ++q) left_of_it += entry(q);
    total += 2.0 * left_of_it + entry(p);
  }
  return total;
}

template <class T>
CT_V4 double share_v4(const Factors<T>& f, int64_t micro_batch, int64_t i) {
  return share_of<T, 64>(f, micro_batch, i);
}
template <class T>
CT_V3 double share_v3(const Factors<T>& f, int64_t micro_batch, int64_t i) {
  return share_of<T, 32>(f, micro_batch, i);
}
template <class T>
double share_base(const Factors<T>& f, int64_t micro_batch, int64_t i) {
  return share_of<T, 16>(f, micro_batch, i);
}

template <class T>
void add_norms(const Factors<T>& f, double* squares, int64_t n, int threads) {
  const auto share = ct_level() == 4 ? share_v4<T> : ct_level() == 3 ? share_v3<T> : share_base<T>;
  const int64_t groups = (f.rows + kHeight - 1) / kHeight;
  std::vector<double> shares(n * groups);
  const auto fill = [&](int64_t t) { shares[t] = share(f, t / groups, t % groups * kHeight); };
  if (threads == 1) {  // a team of one takes 0.7 us to start, 4 % of a small layer
    for (int64_t t = 0; t < n * groups; ++t) fill(t);
  } else {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t t = 0; t < n * groups; ++t) fill(t);
  }
  for (int64_t t = 0; t < n * groups; ++t) squares[t / groups] += shares[t];  // in one order
}

}  // namespace

// Adds to `squares`.
#define CT_GHOST_NORMS(NAME, T)                                                                                       \
  CT_EXPORT void NAME(const T* left, const T* right, double* squares, int64_t n, int64_t rows, int64_t left_width,    \
                      int64_t right_width, double bias, int threads) {                                                \
    add_norms(Factors<T>{left, right, rows, left_width, right_width, static_cast<T>(bias)}, squares, n, threads);     \
  }
CT_GHOST_NORMS(ct_ghost_norms_float32, float)
CT_GHOST_NORMS(ct_ghost_norms_float64, double)

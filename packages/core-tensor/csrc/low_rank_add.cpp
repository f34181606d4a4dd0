// y_j = b_j + c_j (x_j I_j' + beta) O_j for every micro-batch j (see core_tensor/low_rank_add): four rows of x meet all
// rows of I, and what comes out meets all rows of O before anything else does, so both stay in the second cache.
#include <vector>

#include "dots.h"

namespace {

template <class T>
struct Step {
  const T *base, *x, *inner, *outer, *coefficient;
  T* y;
  int64_t base_stride, rows, rank, width, out_width;  // a stride of 0: all rows share one row of b
  T bias;
};

// y[p] = base[p] + sum_j s[j][p] O_j on N vectors of columns.
template <class T, int BYTES, int N>
CT_INLINE void add_columns(T* const* y, const T* const* base, const T* outer, const T* s, int64_t rank,
                           int64_t stride) {
  using Tile = Dots<T, BYTES>;
  using Vec = typename Tile::Vec;
  Vec sum[kHeight][N];
#pragma GCC unroll 4
  for (int p = 0; p < kHeight; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) std::memcpy(&sum[p][v], base[p] + v * Tile::kLanes, sizeof(Vec));
  for (int64_t j = 0; j < rank; ++j) {
    Vec row[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) std::memcpy(&row[v], outer + j * stride + v * Tile::kLanes, sizeof(Vec));
#pragma GCC unroll 4
    for (int p = 0; p < kHeight; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) sum[p][v] += s[j * kHeight + p] * row[v];
  }
#pragma GCC unroll 4
  for (int p = 0; p < kHeight; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) std::memcpy(y[p] + v * Tile::kLanes, &sum[p][v], sizeof(Vec));
}

// Rows i .. i + kHeight of one micro-batch. `s` holds rank * kHeight numbers, `spare` one row of y.
template <class T, int BYTES>
CT_INLINE void add_rows(const Step<T>& step, int64_t micro_batch, int64_t i, T* s, T* spare) {
  using Tile = Dots<T, BYTES>;
  const int64_t rank = step.rank, d = step.out_width;
  const T* x = step.x + micro_batch * step.rows * step.width;
  const T* inner = step.inner + micro_batch * rank * step.width;
  const T* outer = step.outer + micro_batch * rank * d;
  const T c = step.coefficient[micro_batch];
  for (int64_t j = 0; j < rank; j += Tile::kWidth) {
    Column<T> dots[Tile::kWidth] = {};
    Tile::multiply(x, i, step.rows, inner, j, rank, step.width, dots);
#pragma GCC unroll 4
    for (int q = 0; q < Tile::kWidth; ++q) {
      dots[q] = c * (dots[q] + step.bias);
      if (j + q < rank) std::memcpy(s + (j + q) * kHeight, &dots[q], sizeof dots[q]);
    }
  }
  T* y[kHeight];
  const T* base[kHeight];
  for (int p = 0; p < kHeight; ++p) {
    const int64_t row = micro_batch * step.rows + std::min(i + p, step.rows - 1);
    y[p] = i + p < step.rows ? step.y + row * d : spare;
    base[p] = step.base + row * step.base_stride;
  }
  int64_t k = 0;
  const auto advance = [&](int64_t columns) CT_INLINE_LAMBDA {
    k += columns;
    for (int p = 0; p < kHeight; ++p) {
      y[p] += columns;
      base[p] += columns;
    }
  };
  for (; k + 2 * Tile::kLanes <= d; advance(2 * Tile::kLanes)) add_columns<T, BYTES, 2>(y, base, outer + k, s, rank, d);
  for (; k + Tile::kLanes <= d; advance(Tile::kLanes)) add_columns<T, BYTES, 1>(y, base, outer + k, s, rank, d);
  for (; k < d; advance(1)) add_columns<T, sizeof(T), 1>(y, base, outer + k, s, rank, d);
}

template <class T>
CT_V4 void add_v4(const Step<T>& step, int64_t micro_batch, int64_t i, T* s, T* spare) {
  add_rows<T, 64>(step, micro_batch, i, s, spare);
}
template <class T>
CT_V3 void add_v3(const Step<T>& step, int64_t micro_batch, int64_t i, T* s, T* spare) {
  add_rows<T, 32>(step, micro_batch, i, s, spare);
}
template <class T>
void add_base(const Step<T>& step, int64_t micro_batch, int64_t i, T* s, T* spare) {
  add_rows<T, 16>(step, micro_batch, i, s, spare);
}

template <class T>
void add(const Step<T>& step, int64_t n, int threads) {
  const auto rows = ct_level() == 4 ? add_v4<T> : ct_level() == 3 ? add_v3<T> : add_base<T>;
  const int64_t groups = (step.rows + kHeight - 1) / kHeight;
  const auto share = [&](int64_t begin, int64_t end) {
    std::vector<T> s(step.rank * kHeight), spare(step.out_width);
    for (int64_t t = begin; t < end; ++t) rows(step, t / groups, t % groups * kHeight, s.data(), spare.data());
  };
  if (threads == 1) return share(0, n * groups);  // a team of one takes 0.7 us to start, 2 % of a usual call
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < threads; ++t) share(n * groups * t / threads, n * groups * (t + 1) / threads);
}

}  // namespace

#define CT_LOW_RANK_ADD(NAME, T)                                                                                      \
  CT_EXPORT void NAME(T* y, const T* base, const T* x, const T* inner, const T* outer, const T* coefficient,          \
                      int64_t base_stride, int64_t n, int64_t rows, int64_t rank, int64_t width, int64_t out_width,   \
                      double bias, int threads) {                                                                     \
    const std::vector<T> zeros(base ? 0 : out_width);                                                                 \
    const T* start = base ? base : zeros.data();                                                                      \
    const T b = static_cast<T>(bias);                                                                                 \
    add(Step<T>{start, x, inner, outer, coefficient, y, base_stride, rows, rank, width, out_width, b}, n, threads);   \
  }
CT_LOW_RANK_ADD(ct_low_rank_add_float32, float)
CT_LOW_RANK_ADD(ct_low_rank_add_float64, double)

// Column means and the centred second moments X'X - n m m' of a tall matrix, in float64 whatever its dtype, in one
// blocked pass (see core_tensor/centred_moments). Rows are centred and widened as they are packed, so no float64 copy of
// the matrix exists. Each tile of the result is summed over the row blocks by one thread, so bits do not depend on how
// many threads there are.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "core.h"

namespace {

constexpr int64_t kRows = 256;  // rows per block: two packed panels fit into 48 KB

struct Bfloat16 {
  uint16_t bits;
  operator double() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

// A tile of V rows and 3 V columns of the product of two packed panels (rows x 3V, row by row), V doubles to a vector.
template <int BYTES>
struct Tile {
  static constexpr int V = BYTES / 8;
  static constexpr int W = 3 * V;
  typedef double Vec __attribute__((vector_size(BYTES)));

  static CT_INLINE void multiply(const double* a, const double* b, int64_t rows, double* out) {
    Vec sum[V][3] = {};
    for (int64_t k = 0; k < rows; ++k, a += W, b += W) {
      Vec right[3];
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) std::memcpy(&right[j], b + j * V, sizeof(Vec));
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) {
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) sum[i][j] += a[i] * right[j];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) {
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) std::memcpy(out + i * W + j * V, &sum[i][j], sizeof(Vec));
    }
  }

  static CT_INLINE void square(const double* p, const double* q, int64_t rows, double* out) {
    for (int i = 0; i < W; i += V) multiply(p + i, q, rows, out + i * W);
  }
};

CT_V4 void square_v4(const double* p, const double* q, int64_t rows, double* out) { Tile<64>::square(p, q, rows, out); }
CT_V3 void square_v3(const double* p, const double* q, int64_t rows, double* out) { Tile<32>::square(p, q, rows, out); }
void square_v2(const double* p, const double* q, int64_t rows, double* out) { Tile<16>::square(p, q, rows, out); }

template <class T>
CT_INLINE void pack_row(const T* x, int64_t d, int64_t panel, const double* shift, double* packed) {
  int64_t j = 0;
  for (; j + panel <= d; j += panel)
    for (int64_t k = 0; k < panel; ++k) packed[j * kRows + k] = static_cast<double>(x[j + k]) - shift[j + k];
  for (int64_t k = 0; j + k < d; ++k) packed[j * kRows + k] = static_cast<double>(x[j + k]) - shift[j + k];
}

CT_CLONES void pack(const float* x, int64_t d, int64_t panel, const double* shift, double* packed) {
  pack_row(x, d, panel, shift, packed);
}
CT_CLONES void pack(const double* x, int64_t d, int64_t panel, const double* shift, double* packed) {
  pack_row(x, d, panel, shift, packed);
}
CT_CLONES void pack(const Bfloat16* x, int64_t d, int64_t panel, const double* shift, double* packed) {
  pack_row(x, d, panel, shift, packed);
}

CT_CLONES void add_rows(const double* packed, int64_t rows, int64_t panel, double* sums) {
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t j = 0; j < panel; ++j) sums[j] += packed[k * panel + j];
}

// Row and column of tile t of a lower triangle that is numbered row by row.
std::pair<int64_t, int64_t> corner(int64_t t) {
  int64_t p = static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(t) + 1.0) - 1.0) / 2.0);
  while (p * (p + 1) / 2 > t) --p;
  while ((p + 1) * (p + 2) / 2 <= t) ++p;
  return {p, t - p * (p + 1) / 2};
}

template <class T>
void moments(const T* x, int64_t n, int64_t d, double* mean, double* scatter, int threads) {
  const int level = ct_level();
  const auto square = level == 4 ? square_v4 : level == 3 ? square_v3 : square_v2;
  const int64_t panel = level == 4 ? 24 : level == 3 ? 12 : 6;
  const int64_t panels = (d + panel - 1) / panel, tiles = panels * (panels + 1) / 2;
  std::vector<double> packed(panels * panel * kRows, 0.0), sums(panels * panel, 0.0);
  std::fill(scatter, scatter + d * d, 0.0);
  // The shift is the mean of the first block. It lies among the rows, so what it misses of the mean is part of the
  // scatter itself, and taking that out at the end cancels no digits of the whole.
  const int64_t head = std::min(kRows, n);
  std::fill(mean, mean + d, 0.0);
  for (int64_t i = 0; i < head; ++i)
    for (int64_t j = 0; j < d; ++j) mean[j] += static_cast<double>(x[i * d + j]) / static_cast<double>(head);
#pragma omp parallel num_threads(threads)
  for (int64_t first = 0; first < n; first += kRows) {
    const int64_t rows = std::min(kRows, n - first);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) pack(x + (first + i) * d, d, panel, mean, packed.data() + i * panel);
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < panels; ++p)
      add_rows(packed.data() + p * panel * kRows, rows, panel, sums.data() + p * panel);
#pragma omp for schedule(dynamic, 8)
    for (int64_t t = 0; t < tiles; ++t) {
      const auto [p, q] = corner(t);
      const int64_t i0 = p * panel, j0 = q * panel, height = std::min(panel, d - i0), width = std::min(panel, d - j0);
      double tile[24 * 24];
      square(packed.data() + i0 * kRows, packed.data() + j0 * kRows, rows, tile);
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j) scatter[(i0 + i) * d + j0 + j] += tile[i * panel + j];
    }
  }
  constexpr int64_t kSquare = 32;  // the mirror image goes by squares that stay in the first cache
  for (int64_t i0 = 0; i0 < d; i0 += kSquare)
    for (int64_t j0 = 0; j0 <= i0; j0 += kSquare)
      for (int64_t i = i0; i < std::min(i0 + kSquare, d); ++i)
        for (int64_t j = j0; j < std::min(j0 + kSquare, i + 1); ++j) {
          scatter[i * d + j] -= sums[i] * sums[j] / static_cast<double>(n);
          scatter[j * d + i] = scatter[i * d + j];
        }
  for (int64_t j = 0; j < d; ++j) mean[j] += sums[j] / static_cast<double>(n);
}

}  // namespace

CT_EXPORT void ct_centred_moments_float32(const float* x, double* mean, double* scatter, int64_t n, int64_t d,
                                          int threads) {
  moments(x, n, d, mean, scatter, threads);
}

CT_EXPORT void ct_centred_moments_float64(const double* x, double* mean, double* scatter, int64_t n, int64_t d,
                                          int threads) {
  moments(x, n, d, mean, scatter, threads);
}

CT_EXPORT void ct_centred_moments_bfloat16(const uint16_t* x, double* mean, double* scatter, int64_t n, int64_t d,
                                           int threads) {
  moments(reinterpret_cast<const Bfloat16*>(x), n, d, mean, scatter, threads);
}

// Inner products of a few rows with a few others: what the kernels on gradient factors are made of.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core.h"

constexpr int kHeight = 4;

template <class T, int BYTES>
struct Lanes {
  typedef T Vec __attribute__((vector_size(BYTES)));
};
template <class T>
struct Lanes<T, sizeof(T)> {
  typedef T Vec;
};

// A number for each of kHeight rows.
template <class T>
using Column = typename Lanes<T, kHeight * sizeof(T)>::Vec;

// Four of the eight elements of a and b.
template <int A, int B, int C, int D, class Vec>
CT_INLINE Vec pick(Vec a, Vec b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, A, B, C, D);
#else
  return __builtin_shuffle(a, b, decltype(a < b){A, B, C, D});
#endif
}

// The sums over the lanes of four vectors, all at once: one by one they cost a tenth of a product of rows of 512.
template <class T, int BYTES>
CT_INLINE Column<T> sums(const typename Lanes<T, BYTES>::Vec v[kHeight]) {
  if constexpr (BYTES < kHeight * sizeof(T)) {
    return Column<T>{v[0][0] + v[0][1], v[1][0] + v[1][1], v[2][0] + v[2][1], v[3][0] + v[3][1]};
  } else if constexpr (BYTES == kHeight * sizeof(T)) {
    const auto ab = pick<0, 4, 1, 5>(v[0], v[1]) + pick<2, 6, 3, 7>(v[0], v[1]);
    const auto cd = pick<0, 4, 1, 5>(v[2], v[3]) + pick<2, 6, 3, 7>(v[2], v[3]);
    return pick<0, 1, 4, 5>(ab, cd) + pick<2, 3, 6, 7>(ab, cd);
  } else {
    typename Lanes<T, BYTES / 2>::Vec halves[2], folded[kHeight];
#pragma GCC unroll 4
    for (int p = 0; p < kHeight; ++p) {
      std::memcpy(halves, &v[p], sizeof halves);
      folded[p] = halves[0] + halves[1];
    }
    return sums<T, BYTES / 2>(folded);
  }
}

// kHeight rows by WIDTH others at vectors of BYTES: the accumulators and one column of operands fill the 16 (AVX-512:
// 32) vector registers. Loops over them are unrolled by hand, or the compiler keeps the accumulators in memory.
template <class T, int BYTES>
struct Dots {
  typedef typename Lanes<T, BYTES>::Vec Vec;
  static constexpr int kLanes = BYTES / sizeof(T);
  static constexpr int kWidth = BYTES == 64 ? 4 : 3;

  // out[q][p] = <a_(i+p), b_(j+q)> for rows of length d. Rows of a past the end repeat the last one, columns past the end
  // of b may be left as they are: a last one alone takes half the time of a whole tile.
  static CT_INLINE void multiply(const T* a, int64_t i, int64_t a_rows, const T* b, int64_t j, int64_t b_rows,
                                 int64_t d, Column<T> out[kWidth]) {
    if (b_rows - j == 1) return tile<1, false>(a, i, a_rows, b, j, b_rows, d, out);
    tile<kWidth, false>(a, i, a_rows, b, j, b_rows, d, out);
  }

  // The same for rows i .. i + kHeight with themselves; only q <= p is filled in.
  static CT_INLINE void square(const T* a, int64_t i, int64_t rows, int64_t d, Column<T> out[kHeight]) {
    tile<kHeight, true>(a, i, rows, a, i, rows, d, out);
  }

 private:
  template <int WIDTH, bool TRIANGLE>
  static CT_INLINE void tile(const T* a, int64_t i, int64_t a_rows, const T* b, int64_t j, int64_t b_rows, int64_t d,
                             Column<T> out[WIDTH]) {
    const T *left[kHeight], *right[WIDTH];
    for (int p = 0; p < kHeight; ++p) left[p] = a + std::min(i + p, a_rows - 1) * d;
    for (int q = 0; q < WIDTH; ++q) right[q] = b + std::min(j + q, b_rows - 1) * d;
    Vec sum[WIDTH][kHeight] = {};
    int64_t k = 0;
    for (; k + kLanes <= d; k += kLanes) {
      Vec other[WIDTH];
#pragma GCC unroll 4
      for (int q = 0; q < WIDTH; ++q) std::memcpy(&other[q], right[q] + k, sizeof(Vec));
#pragma GCC unroll 4
      for (int p = 0; p < kHeight; ++p) {
        Vec row = other[TRIANGLE ? p : 0];
        if (!TRIANGLE) std::memcpy(&row, left[p] + k, sizeof row);
#pragma GCC unroll 4
        for (int q = 0; q < (TRIANGLE ? p + 1 : WIDTH); ++q) sum[q][p] += row * other[q];
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < WIDTH; ++q) out[q] = sums<T, BYTES>(sum[q]);
#pragma GCC unroll 1
    for (; k < d; ++k) {
      const Column<T> column = {left[0][k], left[1][k], left[2][k], left[3][k]};
#pragma GCC unroll 4
      for (int q = 0; q < WIDTH; ++q) out[q] += column * right[q][k];
    }
  }
};

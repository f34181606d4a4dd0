// Inner products of a few rows with a few others: what the kernels on gradient factors are made of.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core.h"

template <class T, int BYTES>
struct Lanes {
  typedef T Vec __attribute__((vector_size(BYTES)));
  static CT_INLINE T sum(Vec v) {  // by halves
    typename Lanes<T, BYTES / 2>::Vec low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return Lanes<T, BYTES / 2>::sum(low + high);
  }
};
template <class T>
struct Lanes<T, sizeof(T)> {
  typedef T Vec;
  static CT_INLINE T sum(T v) { return v; }
};

constexpr int kHeight = 4;

// kHeight rows by kWidth others at vectors of BYTES: the accumulators and one column of operands fill the 16 (AVX-512:
// 32) vector registers. Loops over them are unrolled by hand, or the compiler keeps the accumulators in memory.
template <class T, int BYTES>
struct Dots {
  typedef typename Lanes<T, BYTES>::Vec Vec;
  static constexpr int kLanes = BYTES / sizeof(T);
  static constexpr int kWidth = BYTES == 64 ? 4 : 3;

  // out[p][q] = <a_(i+p), b_(j+q)> for rows of length d; rows past the end repeat the last one.
  static CT_INLINE void multiply(const T* a, int64_t i, int64_t a_rows, const T* b, int64_t j, int64_t b_rows, int64_t d,
                                 T out[kHeight][kWidth]) {
    const T *left[kHeight], *right[kWidth];
    for (int p = 0; p < kHeight; ++p) left[p] = a + std::min(i + p, a_rows - 1) * d;
    for (int q = 0; q < kWidth; ++q) right[q] = b + std::min(j + q, b_rows - 1) * d;
    Vec sum[kHeight][kWidth] = {};
    int64_t k = 0;
    for (; k + kLanes <= d; k += kLanes) {
      Vec other[kWidth];
#pragma GCC unroll 4
      for (int q = 0; q < kWidth; ++q) std::memcpy(&other[q], right[q] + k, sizeof(Vec));
#pragma GCC unroll 4
      for (int p = 0; p < kHeight; ++p) {
        Vec row;
        std::memcpy(&row, left[p] + k, sizeof row);
#pragma GCC unroll 4
        for (int q = 0; q < kWidth; ++q) sum[p][q] += row * other[q];
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < kHeight; ++p)
#pragma GCC unroll 4
      for (int q = 0; q < kWidth; ++q) out[p][q] = Lanes<T, BYTES>::sum(sum[p][q]);
    for (; k < d; ++k)
      for (int p = 0; p < kHeight; ++p)
        for (int q = 0; q < kWidth; ++q) out[p][q] += left[p][k] * right[q][k];
  }
};

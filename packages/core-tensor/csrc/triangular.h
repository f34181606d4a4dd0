// The loop that CD and GPTQ share. For every column of a (size x columns) block, in order j = 0 .. size-1:
//
//   v_j = base_j + sum_{k<j} A_jk x_k,     x_j = step(j, v_j).
//
// A column is independent of the others, so columns run in the lanes of vectors. A tile is 256 bytes wide, four cache
// lines of every row. Rows are taken kRows at a time: the part of the sum before the group is a register-blocked GEMM
// on x, the part inside the group is triangular.
#pragma once
#include <cstring>

#include "core.h"

constexpr int kRows = 4;
constexpr int64_t kMaxBlock = 1024;
template <typename T>
constexpr int64_t kTile = 256 / sizeof(T);

template <typename T, int Bytes>
struct Simd {
  typedef T Vector __attribute__((vector_size(Bytes)));
  static constexpr int kLanes = Bytes / sizeof(T);
  static constexpr int kVectors = Bytes == 64 ? 4 : 2;  // times kRows accumulators fit the 32 (AVX-512) or 16 registers
};

template <typename V, typename T>
CT_INLINE V load(const T* from, int64_t count, T fill = T(0)) {
  constexpr int64_t lanes = sizeof(V) / sizeof(T);
  V v;
  if (count >= lanes) {
    std::memcpy(&v, from, sizeof v);
  } else {
    for (int64_t i = 0; i < lanes; ++i) v[i] = i < count ? from[i] : fill;
  }
  return v;
}

template <typename V, typename T>
CT_INLINE void store(T* to, V v, int64_t count) {
  constexpr int64_t lanes = sizeof(V) / sizeof(T);
  if (count >= lanes) {
    std::memcpy(to, &v, sizeof v);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = v[i];
  }
}

// Nearest whole number, ties to even, for |x| below 2^22 (float) or 2^51 (double): adding 1.5 * 2^23 (1.5 * 2^52) leaves
// no bits for a fraction.
template <typename T>
constexpr T kShift = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);

template <typename V, typename T>
CT_INLINE V nearest(V x) {
  const V shifted = x + kShift<T>;
  return shifted - kShift<T>;
}

// q(b) = s (clamp(round(b / s) + z, 0, max_code) - z); clamping first keeps the rounding trick in range.
template <typename V, typename T>
CT_INLINE V quantize(V b, V scale, V zero, T max_code) {
  const V high = max_code - zero, low = -zero;
  V code = b / scale;
  code = code < high ? code : high;
  code = code > low ? code : low;
  return scale * nearest<V, T>(code);
}

// `step(j, column, count, v)` handles row j of the vector that starts at `column` and has `count` columns left;
// `fetch(j, column)` asks for the memory that it will touch. Rows lie in pages of their own, which no hardware foresees.
template <typename T, int Bytes, typename Step, typename Fetch>
CT_INLINE void triangular_tile(const T* base, int64_t columns, int64_t first, const T* A, int64_t size, Step step,
                               Fetch fetch) {
  using V = typename Simd<T, Bytes>::Vector;
  constexpr int lanes = Simd<T, Bytes>::kLanes, vectors = Simd<T, Bytes>::kVectors;
  alignas(64) V x[kMaxBlock][vectors];
  const int64_t end = first + kTile<T> < columns ? first + kTile<T> : columns;
  for (int64_t start = first; start < end; start += vectors * lanes) {
    for (int64_t j0 = 0; j0 < size; j0 += kRows) {
      const int rows = static_cast<int>(size - j0 < kRows ? size - j0 : kRows);
      const T* a[kRows];  // rows past the end repeat the last one: the loop below keeps its full width
      for (int r = 0; r < kRows; ++r) a[r] = A + (j0 + (r < rows ? r : rows - 1)) * size;
      for (int64_t j = j0 + kRows; j < j0 + 2 * kRows && j < size; ++j) {
        __builtin_prefetch(base + j * columns + start);
        fetch(j, start);
      }
      V sum[kRows][vectors] = {};
      for (int64_t k = 0; k < j0; ++k)
        for (int c = 0; c < vectors; ++c)
          for (int r = 0; r < kRows; ++r) sum[r][c] += a[r][k] * x[k][c];
      for (int r = 0; r < rows; ++r) {  // the vectors are independent: their latencies overlap
        const int64_t j = j0 + r;
        for (int c = 0; c < vectors; ++c) {
          const int64_t column = start + c * lanes;
          if (column >= columns) break;
          V v = load<V>(base + j * columns + column, columns - column) + sum[r][c];
          for (int i = 0; i < r; ++i) v += a[r][j0 + i] * x[j0 + i][c];
          x[j][c] = step(j, column, columns - column, v);
        }
      }
    }
  }
}

// Runs `Kernel::tile<Bytes>` over all columns at the machine's own vector width.
template <typename Kernel>
CT_V4 void tile_v4(const Kernel& kernel, int64_t first) {
  kernel.template tile<64>(first);
}
template <typename Kernel>
CT_V3 void tile_v3(const Kernel& kernel, int64_t first) {
  kernel.template tile<32>(first);
}
template <typename Kernel>
void tile_base(const Kernel& kernel, int64_t first) {
  kernel.template tile<16>(first);
}

template <typename T, typename Kernel>
void run_tiles(const Kernel& kernel, int64_t columns, int threads) {
  const auto tile = ct_level() == 4 ? tile_v4<Kernel> : ct_level() == 3 ? tile_v3<Kernel> : tile_base<Kernel>;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < columns; first += kTile<T>) tile(kernel, first);
}

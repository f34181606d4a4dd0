// Coordinate descent inside one block of features, for every out feature at once (see core_tensor/cd_block).
#include "triangular.h"

namespace {

template <typename T>
struct CdBlock {
  const T* correction;   // (size, columns)
  const T* weight;       // (size, columns)
  const T* residual;     // (size, columns)
  const T* sigma;        // (size, size), strictly lower part is read
  const T* scale;        // (groups, columns)
  const T* zero;         // (groups, columns)
  const int64_t* group;  // (size)
  const uint8_t* mask;   // (size, columns) or null
  T* updated;            // (size, columns)
  int64_t size, columns;
  T max_code;
  bool rounds;

  template <int Bytes>
  CT_INLINE void tile(int64_t first) const {
    using V = typename Simd<T, Bytes>::Vector;
    const auto step = [&](int64_t j, int64_t column, int64_t count, V u) CT_INLINE_LAMBDA {
      const int64_t at = j * columns + column, grid = group[j] * columns + column;
      const V w = load<V>(weight + at, count);
      const V beta = w + u;
      V value = beta;
      if (rounds) value = quantize(beta, load<V>(scale + grid, count, T(1)), load<V>(zero + grid, count), max_code);
      if (rounds && mask)  // outliers stay continuous
        for (int64_t i = 0; i < Simd<T, Bytes>::kLanes && i < count; ++i)
          if (mask[at + i]) value[i] = beta[i];
      const V fresh = w - value;
      store(updated + at, fresh, count);
      return fresh - load<V>(residual + at, count);
    };
    const auto fetch = [&](int64_t j, int64_t column) CT_INLINE_LAMBDA {
      const int64_t at = j * columns + column;
      __builtin_prefetch(weight + at);
      __builtin_prefetch(residual + at);
      __builtin_prefetch(updated + at, 1);
    };
    triangular_tile<T, Bytes>(correction, columns, first, sigma, size, step, fetch);
  }
};

}  // namespace

#define CT_CD_BLOCK(NAME, T)                                                                                           \
  CT_EXPORT int NAME(const T* correction, const T* weight, const T* residual, const T* sigma, const T* scale,          \
                     const T* zero, const int64_t* group, const uint8_t* mask, T* updated, int64_t size,               \
                     int64_t columns, int64_t groups, int max_code, int rounds, int threads) {                         \
    if (!are_indices(group, size, groups)) return 0;                                                                   \
    const CdBlock<T> block{correction, weight, residual, sigma, scale, zero, group, mask, updated, size, columns,      \
                           static_cast<T>(max_code), rounds != 0};                                                     \
    run_tiles<T>(block, columns, threads);                                                                             \
    return 1;                                                                                                          \
  }

CT_CD_BLOCK(ct_cd_block_float32, float)
CT_CD_BLOCK(ct_cd_block_float64, double)

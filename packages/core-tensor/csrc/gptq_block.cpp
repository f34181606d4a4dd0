// GPTQ inside one block of features, for every out feature at once (see core_tensor/gptq_block).
#include "triangular.h"

namespace {

template <typename T>
struct GptqBlock {
  const T* weight;       // (size, columns)
  const T* lower;        // (size, size): -U transposed, strictly lower part is read
  const T* diagonal;     // (size): U_jj
  const T* scale;        // (groups, columns)
  const T* zero;         // (groups, columns)
  const int64_t* group;  // (size)
  T* quantized;          // (size, columns)
  T* error;              // (size, columns)
  int64_t size, columns;
  T max_code;

  template <int Bytes>
  CT_INLINE void tile(int64_t first) const {
    using V = typename Simd<T, Bytes>::Vector;
    const auto step = [&](int64_t j, int64_t column, int64_t count, V w) CT_INLINE_LAMBDA {
      const int64_t at = j * columns + column, grid = group[j] * columns + column;
      const V value = quantize(w, load<V>(scale + grid, count, T(1)), load<V>(zero + grid, count), max_code);
      const V e = (w - value) / diagonal[j];
      store(quantized + at, value, count);
      store(error + at, e, count);
      return e;
    };
    const auto fetch = [&](int64_t j, int64_t column) CT_INLINE_LAMBDA {
      __builtin_prefetch(quantized + j * columns + column, 1);
      __builtin_prefetch(error + j * columns + column, 1);
    };
    triangular_tile<T, Bytes>(weight, columns, first, lower, size, step, fetch);
  }
};

}  // namespace

#define CT_GPTQ_BLOCK(NAME, T)                                                                                         \
  CT_EXPORT int NAME(const T* weight, const T* lower, const T* diagonal, const T* scale, const T* zero,                \
                     const int64_t* group, T* quantized, T* error, int64_t size, int64_t columns, int64_t groups,      \
                     int max_code, int threads) {                                                                      \
    if (!are_indices(group, size, groups)) return 0;                                                                   \
    const T top = static_cast<T>(max_code);                                                                            \
    run_tiles<T>(GptqBlock<T>{weight, lower, diagonal, scale, zero, group, quantized, error, size, columns, top},      \
                 columns, threads);                                                                                    \
    return 1;                                                                                                          \
  }

CT_GPTQ_BLOCK(ct_gptq_block_float32, float)
CT_GPTQ_BLOCK(ct_gptq_block_float64, double)

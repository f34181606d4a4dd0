// y = x W^T for packed W, plus sparse outliers (see core_tensor/quantized_linear).
//
// Few tokens: a row is unpacked eight codes at a time in registers and multiplied at once, so that only the packed bytes
// come from memory. Many tokens: the caller dequantizes some rows into a buffer and hands them to a GEMM.
#include <cstring>

#include "core.h"

namespace {

struct Packed {
  const uint8_t* words;  // (rows, row_bytes)
  const float* scale;    // (rows, groups)
  const uint8_t* zero;   // (rows, groups)
  int64_t columns, row_bytes, groups, group_size;
  int bits;
};

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

CT_INLINE uint64_t stream_of(const uint8_t* bytes, int64_t left) {
  uint64_t stream = 0;
  if (left >= 8) {
    std::memcpy(&stream, bytes, 8);
  } else if (left > 0) {
    std::memcpy(&stream, bytes, left);
  }
  return stream;
}

// The eight codes at the head of a bit stream, as floats. Four codes of up to 8 bits fit 32 bits, so both halves are
// shifted in 32-bit lanes.
CT_INLINE Floats eight_codes(uint64_t stream, int bits) {
  const int32_t low = static_cast<int32_t>(stream), high = static_cast<int32_t>(stream >> (4 * bits));
  const Ints halves = {low, low, low, low, high, high, high, high};
  const Ints shifts = {0, bits, 2 * bits, 3 * bits, 0, bits, 2 * bits, 3 * bits};
  return __builtin_convertvector((halves >> shifts) & ((1 << bits) - 1), Floats);
}

CT_INLINE Floats eight_inputs(const float* x, int64_t count) {
  Floats v = {};
  std::memcpy(&v, x, count < 8 ? count * sizeof(float) : sizeof v);
  return v;
}

// dot[t] = sum over a group's columns of code * x[t], kTokens at a time and kStreams times eight codes in flight. Groups
// start at multiples of eight codes (checked by the caller).
template <int kTokens>
CT_INLINE void dot_codes(const uint8_t* bytes, int64_t left, int bits, const float* x, int64_t stride, int64_t count,
                         float* dot) {
  constexpr int kStreams = 4 / kTokens;
  Floats sum[kTokens][kStreams] = {};
  int64_t j = 0;
  for (; j + 8 * kStreams <= count && left >= bits * (kStreams - 1) + 8; j += 8 * kStreams) {
    for (int k = 0; k < kStreams; ++k) {
      uint64_t stream;
      std::memcpy(&stream, bytes + k * bits, 8);
      const Floats code = eight_codes(stream, bits);
      for (int t = 0; t < kTokens; ++t) {
        Floats v;
        std::memcpy(&v, x + t * stride + j + 8 * k, sizeof v);
        sum[t][k] += code * v;
      }
    }
    bytes += kStreams * bits;
    left -= kStreams * bits;
  }
  for (; j < count; j += 8, bytes += bits, left -= bits) {
    const Floats code = eight_codes(stream_of(bytes, left), bits);
    for (int t = 0; t < kTokens; ++t) sum[t][0] += code * eight_inputs(x + t * stride + j, count - j);
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int k = 1; k < kStreams; ++k) sum[t][0] += sum[t][k];
    dot[t] = 0;
    for (int i = 0; i < 8; ++i) dot[t] += sum[t][0][i];
  }
}

template <int kTokens>
CT_INLINE void multiply_row(const Packed& w, int64_t row, const float* x, const float* x_sums, float* y, int64_t rows) {
  float total[kTokens] = {};
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t start = g * w.group_size, offset = start / 8 * w.bits, at = row * w.groups + g;
    const int64_t count = w.columns - start < w.group_size ? w.columns - start : w.group_size;
    float dot[kTokens];
    dot_codes<kTokens>(w.words + row * w.row_bytes + offset, w.row_bytes - offset, w.bits, x + start, w.columns, count,
                       dot);
    for (int t = 0; t < kTokens; ++t) total[t] += w.scale[at] * (dot[t] - w.zero[at] * x_sums[t * w.groups + g]);
  }
  for (int t = 0; t < kTokens; ++t) y[t * rows + row] = total[t];
}

CT_CLONES void one_token(const Packed& w, int64_t row, const float* x, const float* x_sums, float* y, int64_t rows) {
  multiply_row<1>(w, row, x, x_sums, y, rows);
}
CT_CLONES void four_tokens(const Packed& w, int64_t row, const float* x, const float* x_sums, float* y, int64_t rows) {
  multiply_row<4>(w, row, x, x_sums, y, rows);
}

CT_CLONES void dequantize_row(const Packed& w, int64_t row, float* out) {
  const uint8_t* bytes = w.words + row * w.row_bytes;
  int64_t left = w.row_bytes;
  for (int64_t g = 0; g < w.groups; ++g) {
    const float scale = w.scale[row * w.groups + g], zero = w.zero[row * w.groups + g];
    const int64_t start = g * w.group_size;
    const int64_t end = start + w.group_size < w.columns ? start + w.group_size : w.columns;
    for (int64_t j = start; j < end; j += 8, bytes += w.bits, left -= w.bits) {
      const Floats value = scale * (eight_codes(stream_of(bytes, left), w.bits) - zero);
      if (end - j >= 8) {
        std::memcpy(out + j, &value, sizeof value);
      } else {
        std::memcpy(out + j, &value, (end - j) * sizeof(float));
      }
    }
  }
}

}  // namespace

// One token or a multiple of four.
CT_EXPORT void ct_quantized_gemv(const float* x, const float* x_sums, const uint8_t* words, const float* scale,
                                 const uint8_t* zero, float* y, int64_t tokens, int64_t rows, int64_t columns,
                                 int64_t row_bytes, int64_t groups, int64_t group_size, int bits, int threads) {
  const Packed w{words, scale, zero, columns, row_bytes, groups, group_size, bits};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    if (tokens == 1) {
      one_token(w, row, x, x_sums, y, rows);
    } else {
      for (int64_t t = 0; t < tokens; t += 4)
        four_tokens(w, row, x + t * columns, x_sums + t * groups, y + t * rows, rows);
    }
  }
}

CT_EXPORT void ct_dequantize_rows(const uint8_t* words, const float* scale, const uint8_t* zero, float* out,
                                  int64_t rows, int64_t columns, int64_t row_bytes, int64_t groups, int64_t group_size,
                                  int bits, int threads) {
  const Packed w{words, scale, zero, columns, row_bytes, groups, group_size, bits};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) dequantize_row(w, row, out + row * columns);
}

// y[t, row] += sum over the row's outliers of value * x[t, column]. Returns 1, or 0 for offsets that do not rise from 0
// to the number of outliers or a column that x does not have; y is of no use then.
CT_EXPORT int ct_add_outliers(const float* x, const int64_t* offsets, const int32_t* columns, const float* values,
                              float* y, int64_t tokens, int64_t rows, int64_t features, int64_t outliers, int threads) {
  if (!are_offsets(offsets, rows, outliers)) return 0;
  int refused = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : refused)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = offsets[row], end = offsets[row + 1];
    int outside = 0;
    for (int64_t k = begin; k < end; ++k) outside |= static_cast<uint32_t>(columns[k]) >= features;
    refused |= outside;
    for (int64_t t = 0; t < tokens && !outside; ++t) {
      float sum = 0;
      for (int64_t k = begin; k < end; ++k) sum += values[k] * x[t * features + columns[k]];
      y[t * rows + row] += sum;
    }
  }
  return !refused;
}

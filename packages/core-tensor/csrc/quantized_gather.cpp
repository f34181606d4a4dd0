// Rows of 8-bit codes with a float16 scale and a float32 bias (see core_tensor/quantized_gather), each spread over its
// range or added to its bag in registers, sixteen columns at a time.
#include <cstring>

#include "core.h"

namespace {

constexpr int64_t kMetadata = 6;

CT_INLINE float half_to_float(uint16_t half) {  // finite halves only
  uint32_t bits = static_cast<uint32_t>(half & 0x7FFFu) << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  return half & 0x8000u ? -value : value;
}

struct Range {
  float scale, bias;
};

CT_INLINE Range range_of(const uint8_t* row, int64_t d) {
  uint16_t scale;
  Range range;
  std::memcpy(&scale, row + d, 2);
  std::memcpy(&range.bias, row + d + 2, 4);
  range.scale = half_to_float(scale);
  return range;
}

// Vector types of a width that depends on a template's argument are not vectors to every compiler: spelled out.
template <int BYTES>
struct Types;
#define CT_TYPES(BYTES)                                          \
  template <>                                                    \
  struct Types<BYTES> {                                          \
    typedef float Floats __attribute__((vector_size(BYTES)));    \
    typedef int32_t Integers __attribute__((vector_size(BYTES))); \
    typedef uint8_t Codes __attribute__((vector_size(BYTES / 4))); \
  };
CT_TYPES(64)
CT_TYPES(32)
CT_TYPES(16)

template <int BYTES>
struct Vectors {
  static constexpr int kWidth = BYTES / 4;
  using Floats = typename Types<BYTES>::Floats;
  using Integers = typename Types<BYTES>::Integers;
  using Codes = typename Types<BYTES>::Codes;

  static CT_INLINE Floats load(const uint8_t* codes) {
    Codes narrow;
    std::memcpy(&narrow, codes, sizeof narrow);
    // in two steps, each of which is one instruction; at once, GCC converts one code after the other
    return __builtin_convertvector(__builtin_convertvector(narrow, Integers), Floats);
  }
  static CT_INLINE void store(float* out, Floats value) { std::memcpy(out, &value, sizeof value); }
};

struct Job {
  const uint8_t* table;
  const int64_t *ids, *offsets;
  int64_t d;
  float* out;
};

template <int BYTES>
CT_INLINE void single(const Job& job, int64_t begin, int64_t end) {
  using V = Vectors<BYTES>;
  const int64_t d = job.d, stride = d + kMetadata, whole = d - d % V::kWidth;
  for (int64_t i = begin; i < end; ++i) {
    if (i + 16 < end) {
      const uint8_t* ahead = job.table + job.ids[i + 16] * stride;
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + stride - 1);
    }
    const uint8_t* row = job.table + job.ids[i] * stride;
    const Range r = range_of(row, d);
    float* out = job.out + i * d;
    for (int64_t j = 0; j < whole; j += V::kWidth) V::store(out + j, V::load(row + j) * r.scale + r.bias);
    for (int64_t j = whole; j < d; ++j) out[j] = r.scale * row[j] + r.bias;
  }
}

// Columns `first` .. `first + COLUMNS * kWidth` of one bag.
template <int BYTES, int COLUMNS>
CT_INLINE void columns_of_bag(const Job& job, int64_t bag, int64_t first) {
  using V = Vectors<BYTES>;
  const int64_t d = job.d, stride = d + kMetadata;
  typename V::Floats sums[COLUMNS] = {};
  const int64_t end = job.offsets[bag + 1];
  for (int64_t i = job.offsets[bag]; i < end; ++i) {
    if (i + 8 < job.offsets[bag + 1]) {
      const uint8_t* ahead = job.table + job.ids[i + 8] * stride;
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + stride - 1);
    }
    const uint8_t* row = job.table + job.ids[i] * stride;
    const Range r = range_of(row, d);
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) sums[c] += V::load(row + first + c * V::kWidth) * r.scale + r.bias;
  }
#pragma GCC unroll 8
  for (int c = 0; c < COLUMNS; ++c) V::store(job.out + bag * d + first + c * V::kWidth, sums[c]);
}

template <int BYTES>
CT_INLINE void bags(const Job& job, int64_t begin, int64_t end) {
  using V = Vectors<BYTES>;
  const int64_t d = job.d, stride = d + kMetadata;
  for (int64_t bag = begin; bag < end; ++bag) {
    int64_t j = 0;
    for (; j + 4 * V::kWidth <= d; j += 4 * V::kWidth) columns_of_bag<BYTES, 4>(job, bag, j);
    for (; j + V::kWidth <= d; j += V::kWidth) columns_of_bag<BYTES, 1>(job, bag, j);
    for (; j < d; ++j) {
      float sum = 0;
      for (int64_t i = job.offsets[bag]; i < job.offsets[bag + 1]; ++i) {
        const uint8_t* row = job.table + job.ids[i] * stride;
        const Range r = range_of(row, d);
        sum += r.scale * row[j] + r.bias;
      }
      job.out[bag * d + j] = sum;
    }
  }
}

#define CT_LEVEL(MARK, NAME, BYTES)                                                            \
  MARK void single_##NAME(const Job& job, int64_t begin, int64_t end) { single<BYTES>(job, begin, end); } \
  MARK void bags_##NAME(const Job& job, int64_t begin, int64_t end) { bags<BYTES>(job, begin, end); }
CT_LEVEL(CT_V4, v4, 64)
CT_LEVEL(CT_V3, v3, 32)
CT_LEVEL(, base, 16)

}  // namespace

// `count` ids, or bags where `offsets` is not null; all in range: the caller has checked.
CT_EXPORT void ct_quantized_gather(const uint8_t* table, const int64_t* ids, const int64_t* offsets, int64_t count,
                                   int64_t d, float* out, int threads) {
  const Job job{table, ids, offsets, d, out};
  const auto run = offsets ? (ct_level() == 4 ? bags_v4 : ct_level() == 3 ? bags_v3 : bags_base)
                           : (ct_level() == 4 ? single_v4 : ct_level() == 3 ? single_v3 : single_base);
  const int64_t piece = 512;
  if (threads == 1 || count <= piece) {
    run(job, 0, count);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t begin = 0; begin < count; begin += piece) run(job, begin, begin + piece < count ? begin + piece : count);
}

// Rows of 8-bit codes with a float16 scale and a float32 bias (see core_tensor/quantized_gather), each spread over its
// range or added to its bag in registers, sixteen columns at a time.
#include <cstring>

#include "core.h"

#ifdef CORE_TENSOR_X86_LEVELS
#include <immintrin.h>
#endif

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

struct Job {
  const uint8_t* table;
  int64_t rows;
  const int64_t *ids, *offsets;
  int64_t d;
  float* out;
  bool past_caches;  // vectors of `out` go straight to memory
};

// Bytes of output from which on it goes past the caches: they would not hold it until it is read, and a store into them
// reads the line first. Half of that pays for whoever reads the output next with what is won here.
constexpr int64_t kPastCaches = 8 << 20;

// Cache lines that are asked for before they are needed: rows of a table that no cache holds come one miss after the
// other otherwise. A quarter of them takes twice as long for rows of 16 columns, more change nothing, and 16 kB fit into
// every first-level cache.
constexpr int64_t kLinesAhead = 256;

CT_INLINE int64_t rows_ahead(int64_t stride) {
  const int64_t lines = (stride + 62) / 64 + 1;  // that a row may lie on
  return lines > kLinesAhead / 8 ? 8 : kLinesAhead / lines;
}

// Asks for the row of the i-th id; false if the table has no such row. Every id passes here before its row is read.
CT_INLINE bool ask(const Job& job, int64_t i, int64_t stride) {
  const int64_t id = job.ids[i];
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(job.rows)) return false;
  const uint8_t* row = job.table + id * stride;
  for (int64_t b = 0; b < stride - 1; b += 64) __builtin_prefetch(row + b);
  __builtin_prefetch(row + stride - 1);
  return true;
}

// The first rows of a run, which no loop has asked for.
CT_INLINE bool ask_first(const Job& job, int64_t begin, int64_t end, int64_t stride) {
  const int64_t ahead = rows_ahead(stride);
  for (int64_t i = begin; i < end && i < begin + ahead; ++i)
    if (!ask(job, i, stride)) return false;
  return true;
}

// Plain loops, for machines without the vectors below.
bool single_base(const Job& job, int64_t begin, int64_t end) {
  const int64_t d = job.d, stride = d + kMetadata, ahead = rows_ahead(stride);
  if (!ask_first(job, begin, end, stride)) return false;
  for (int64_t i = begin; i < end; ++i) {
    if (i + ahead < end && !ask(job, i + ahead, stride)) return false;
    const uint8_t* row = job.table + job.ids[i] * stride;
    const Range r = range_of(row, d);
    for (int64_t j = 0; j < d; ++j) job.out[i * d + j] = r.scale * row[j] + r.bias;
  }
  return true;
}

bool bags_base(const Job& job, int64_t begin, int64_t end) {
  const int64_t d = job.d, stride = d + kMetadata, ahead = rows_ahead(stride), last = job.offsets[end];
  if (!ask_first(job, job.offsets[begin], last, stride)) return false;
  for (int64_t bag = begin; bag < end; ++bag) {
    float* out = job.out + bag * d;
    for (int64_t j = 0; j < d; ++j) out[j] = 0;
    for (int64_t i = job.offsets[bag]; i < job.offsets[bag + 1]; ++i) {
      if (i + ahead < last && !ask(job, i + ahead, stride)) return false;
      const uint8_t* row = job.table + job.ids[i] * stride;
      const Range r = range_of(row, d);
      for (int64_t j = 0; j < d; ++j) out[j] += r.scale * row[j] + r.bias;
    }
  }
  return true;
}

using Run = bool (*)(const Job&, int64_t, int64_t);

#ifdef CORE_TENSOR_X86_LEVELS

// Sixteen columns of a row; those behind its end are zero codes.
#define CT_ROW_V4(ROW, J, MASK, SCALE, BIAS)                                                                      \
  _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(MASK, (ROW) + (J)))), SCALE, BIAS)

CT_V4 bool single_v4(const Job& job, int64_t begin, int64_t end) {
  const int64_t d = job.d, stride = d + kMetadata, ahead = rows_ahead(stride);
  if (!ask_first(job, begin, end, stride)) return false;
  for (int64_t i = begin; i < end; ++i) {
    if (i + ahead < end && !ask(job, i + ahead, stride)) return false;
    const uint8_t* row = job.table + job.ids[i] * stride;
    const Range r = range_of(row, d);
    const __m512 scale = _mm512_set1_ps(r.scale), bias = _mm512_set1_ps(r.bias);
    float* out = job.out + i * d;
    for (int64_t j = 0; j < d; j += 16) {
      const __mmask16 mask = d - j >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (d - j)) - 1);
      const __m512 values = CT_ROW_V4(row, j, mask, scale, bias);
      if (job.past_caches)
        _mm512_stream_ps(out + j, values);
      else
        _mm512_mask_storeu_ps(out + j, mask, values);
    }
  }
  _mm_sfence();
  return true;
}

CT_V4 bool bags_v4(const Job& job, int64_t begin, int64_t end) {
  const int64_t d = job.d, stride = d + kMetadata, ahead = rows_ahead(stride), last = job.offsets[end];
  if (!ask_first(job, job.offsets[begin], last, stride)) return false;
  for (int64_t bag = begin; bag < end; ++bag) {
    for (int64_t first = 0; first < d; first += 64) {  // four vectors of sums stay in registers
      __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
      __mmask16 masks[4];
      for (int c = 0; c < 4; ++c) {
        const int64_t left = d - first - 16 * c;
        masks[c] = left >= 16 ? 0xFFFF : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
      }
      const int vectors = d - first >= 64 ? 4 : static_cast<int>((d - first + 15) / 16);
      for (int64_t i = job.offsets[bag]; i < job.offsets[bag + 1]; ++i) {
        if (first == 0 && i + ahead < last && !ask(job, i + ahead, stride)) return false;
        const uint8_t* row = job.table + job.ids[i] * stride;
        const Range r = range_of(row, d);
        const __m512 scale = _mm512_set1_ps(r.scale), bias = _mm512_set1_ps(r.bias);
#define CT_ADD(C) sums[C] = _mm512_add_ps(sums[C], CT_ROW_V4(row, first + 16 * C, masks[C], scale, bias))
        CT_ADD(0);
        if (vectors > 1) CT_ADD(1);
        if (vectors > 2) CT_ADD(2);
        if (vectors > 3) CT_ADD(3);
#undef CT_ADD
      }
      for (int c = 0; c < vectors; ++c) _mm512_mask_storeu_ps(job.out + bag * d + first + 16 * c, masks[c], sums[c]);
    }
  }
  return true;
}

#define CT_V3_INLINE __attribute__((target("arch=x86-64-v3"), always_inline)) inline

// scale * codes + sum, eight columns of a row.
CT_V3_INLINE __m256 row_v3(const uint8_t* codes, __m256 scale, __m256 sum) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight)), scale, sum);
}

CT_V3_INLINE Range range_v3(const uint8_t* row, int64_t d) {
  uint16_t scale;
  Range range;
  std::memcpy(&scale, row + d, 2);
  std::memcpy(&range.bias, row + d + 2, 4);
  range.scale = _cvtsh_ss(scale);
  return range;
}

// With the width known to the compiler (kD > 0) a row of 16 is two vectors and no loop.
template <int64_t kD>
CT_V3 bool single_v3(const Job& job, int64_t begin, int64_t end) {
  const int64_t d = kD ? kD : job.d, stride = d + kMetadata, ahead = rows_ahead(stride);
  if (!ask_first(job, begin, end, stride)) return false;
  for (int64_t i = begin; i < end; ++i) {
    if (i + ahead < end && !ask(job, i + ahead, stride)) return false;
    const uint8_t* row = job.table + job.ids[i] * stride;
    const Range r = range_v3(row, d);
    const __m256 scale = _mm256_set1_ps(r.scale), bias = _mm256_set1_ps(r.bias);
    float* out = job.out + i * d;
    int64_t j = 0;
    for (; j + 8 <= d; j += 8) {
      const __m256 values = row_v3(row + j, scale, bias);
      if (job.past_caches)
        _mm256_stream_ps(out + j, values);
      else
        _mm256_storeu_ps(out + j, values);
    }
    for (; j < d; ++j) out[j] = r.scale * row[j] + r.bias;
  }
  _mm_sfence();
  return true;
}

// The columns [first, first + 8 kVectors) of a bag, summed in registers; the biases are summed beside them. The first
// columns of a bag ask for the rows ahead.
template <int kVectors, int64_t kD>
CT_V3 bool bag_columns(const Job& job, int64_t bag, int64_t last, int64_t first) {
  const int64_t d = kD ? kD : job.d, stride = d + kMetadata, ahead = rows_ahead(stride);
  __m256 sums[kVectors];
  for (int c = 0; c < kVectors; ++c) sums[c] = _mm256_setzero_ps();
  float biases = 0;
  for (int64_t i = job.offsets[bag]; i < job.offsets[bag + 1]; ++i) {
    if (first == 0 && i + ahead < last && !ask(job, i + ahead, stride)) return false;
    const uint8_t* row = job.table + job.ids[i] * stride;
    const Range r = range_v3(row, d);
    const __m256 scale = _mm256_set1_ps(r.scale);
    biases += r.bias;
    for (int c = 0; c < kVectors; ++c) sums[c] = row_v3(row + first + 8 * c, scale, sums[c]);
  }
  const __m256 bias = _mm256_set1_ps(biases);
  for (int c = 0; c < kVectors; ++c) _mm256_storeu_ps(job.out + bag * d + first + 8 * c, _mm256_add_ps(sums[c], bias));
  return true;
}

template <int64_t kD>
CT_V3 bool bags_v3(const Job& job, int64_t begin, int64_t end) {
  const int64_t d = kD ? kD : job.d, stride = d + kMetadata, ahead = rows_ahead(stride), last = job.offsets[end];
  if (!ask_first(job, job.offsets[begin], last, stride)) return false;
  for (int64_t bag = begin; bag < end; ++bag) {
    int64_t j = 0;
    for (; j + 64 <= d; j += 64)
      if (!bag_columns<8, kD>(job, bag, last, j)) return false;
    for (; j + 16 <= d; j += 16)
      if (!bag_columns<2, kD>(job, bag, last, j)) return false;
    for (; j + 8 <= d; j += 8)
      if (!bag_columns<1, kD>(job, bag, last, j)) return false;
    for (; j < d; ++j) {
      float sum = 0;
      for (int64_t i = job.offsets[bag]; i < job.offsets[bag + 1]; ++i) {
        if (j == 0 && i + ahead < last && !ask(job, i + ahead, stride)) return false;
        const uint8_t* row = job.table + job.ids[i] * stride;
        const Range r = range_v3(row, d);
        sum += r.scale * row[j] + r.bias;
      }
      job.out[bag * d + j] = sum;
    }
  }
  return true;
}

Run chosen(bool bags, int64_t d) {
  switch (ct_level()) {
    case 4:
      return bags ? bags_v4 : single_v4;
    case 3:
      if (d == 16) return bags ? bags_v3<16> : single_v3<16>;
      if (d == 32) return bags ? bags_v3<32> : single_v3<32>;
      if (d == 64) return bags ? bags_v3<64> : single_v3<64>;
      return bags ? bags_v3<0> : single_v3<0>;
    default:
      return bags ? bags_base : single_base;
  }
}

#else
Run chosen(bool bags, int64_t) { return bags ? bags_base : single_base; }
#endif

}  // namespace

// `count` ids, or bags of `total` ids where `offsets` is not null. Returns 0 if an id or an offset leads outside.
CT_EXPORT int ct_quantized_gather(const uint8_t* table, const int64_t* ids, const int64_t* offsets, int64_t rows,
                                  int64_t total, int64_t count, int64_t d, float* out, int threads) {
  if (offsets && !are_offsets(offsets, count, total)) return 0;
  const bool aligned = d % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  const Job job{table, rows, ids, offsets, d, out, aligned && count * d * 4 >= kPastCaches};
  const Run run = chosen(offsets != nullptr, d);
  const int64_t piece = 512;
  if (threads == 1 || count <= piece) return run(job, 0, count);
  int good = 1;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(& : good)
  for (int64_t begin = 0; begin < count; begin += piece)
    good &= run(job, begin, begin + piece < count ? begin + piece : count);
  return good;
}

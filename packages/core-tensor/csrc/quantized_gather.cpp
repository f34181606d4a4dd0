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
  const int64_t *ids, *offsets;
  int64_t d;
  float* out;
};

constexpr int64_t kAhead = 24;  // rows that are asked for before they are needed

CT_INLINE void prefetch(const Job& job, int64_t i, int64_t end) {
  if (i + kAhead >= end) return;
  const int64_t stride = job.d + kMetadata;
  const uint8_t* ahead = job.table + job.ids[i + kAhead] * stride;
  __builtin_prefetch(ahead);
  __builtin_prefetch(ahead + stride - 1);
}

// Plain loops, for machines without the vectors below.
void single_base(const Job& job, int64_t begin, int64_t end) {
  const int64_t d = job.d, stride = d + kMetadata;
  for (int64_t i = begin; i < end; ++i) {
    prefetch(job, i, end);
    const uint8_t* row = job.table + job.ids[i] * stride;
    const Range r = range_of(row, d);
    for (int64_t j = 0; j < d; ++j) job.out[i * d + j] = r.scale * row[j] + r.bias;
  }
}

void bags_base(const Job& job, int64_t begin, int64_t end) {
  const int64_t d = job.d, stride = d + kMetadata, last = job.offsets[end];
  for (int64_t bag = begin; bag < end; ++bag) {
    float* out = job.out + bag * d;
    for (int64_t j = 0; j < d; ++j) out[j] = 0;
    for (int64_t i = job.offsets[bag]; i < job.offsets[bag + 1]; ++i) {
      prefetch(job, i, last);
      const uint8_t* row = job.table + job.ids[i] * stride;
      const Range r = range_of(row, d);
      for (int64_t j = 0; j < d; ++j) out[j] += r.scale * row[j] + r.bias;
    }
  }
}

#ifdef CORE_TENSOR_X86_LEVELS

// Sixteen columns of a row; those behind its end are zero codes.
#define CT_ROW_V4(ROW, J, MASK, SCALE, BIAS)                                                                      \
  _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(MASK, (ROW) + (J)))), SCALE, BIAS)

CT_V4 void single_v4(const Job& job, int64_t begin, int64_t end) {
  const int64_t d = job.d, stride = d + kMetadata;
  for (int64_t i = begin; i < end; ++i) {
    prefetch(job, i, end);
    const uint8_t* row = job.table + job.ids[i] * stride;
    const Range r = range_of(row, d);
    const __m512 scale = _mm512_set1_ps(r.scale), bias = _mm512_set1_ps(r.bias);
    float* out = job.out + i * d;
    for (int64_t j = 0; j < d; j += 16) {
      const __mmask16 mask = d - j >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (d - j)) - 1);
      _mm512_mask_storeu_ps(out + j, mask, CT_ROW_V4(row, j, mask, scale, bias));
    }
  }
}

CT_V4 void bags_v4(const Job& job, int64_t begin, int64_t end) {
  const int64_t d = job.d, stride = d + kMetadata, last = job.offsets[end];
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
        if (first == 0) prefetch(job, i, last);
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
}

CT_V3 void single_v3(const Job& job, int64_t begin, int64_t end) {
  const int64_t d = job.d, stride = d + kMetadata;
  for (int64_t i = begin; i < end; ++i) {
    prefetch(job, i, end);
    const uint8_t* row = job.table + job.ids[i] * stride;
    const Range r = range_of(row, d);
    const __m256 scale = _mm256_set1_ps(r.scale), bias = _mm256_set1_ps(r.bias);
    float* out = job.out + i * d;
    int64_t j = 0;
    for (; j + 8 <= d; j += 8) {
      const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + j));
      _mm256_storeu_ps(out + j, _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)), scale, bias));
    }
    for (; j < d; ++j) out[j] = r.scale * row[j] + r.bias;
  }
}

CT_V3 void bags_v3(const Job& job, int64_t begin, int64_t end) {
  const int64_t d = job.d, stride = d + kMetadata, last = job.offsets[end];
  for (int64_t bag = begin; bag < end; ++bag) {
    float* out = job.out + bag * d;
    for (int64_t j = 0; j < d; ++j) out[j] = 0;
    for (int64_t i = job.offsets[bag]; i < job.offsets[bag + 1]; ++i) {
      prefetch(job, i, last);
      const uint8_t* row = job.table + job.ids[i] * stride;
      const Range r = range_of(row, d);
      const __m256 scale = _mm256_set1_ps(r.scale), bias = _mm256_set1_ps(r.bias);
      int64_t j = 0;
      for (; j + 8 <= d; j += 8) {
        const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + j));
        const __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)), scale, bias);
        _mm256_storeu_ps(out + j, _mm256_add_ps(_mm256_loadu_ps(out + j), value));
      }
      for (; j < d; ++j) out[j] += r.scale * row[j] + r.bias;
    }
  }
}

#else
constexpr auto single_v4 = single_base, single_v3 = single_base, bags_v4 = bags_base, bags_v3 = bags_base;
#endif

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

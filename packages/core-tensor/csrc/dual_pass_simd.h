// The dual pass for simplices with one row per variable, by vectors: AVX-512 and AVX2.
// Tiles are read straight through; blocks then find their least entry and their candidates, which for up to 16
// variables stay in registers.
#pragma once
#include "core.h"
#include "dual_pass.h"

#if defined(CORE_TENSOR_X86_LEVELS) && defined(__x86_64__) && !defined(__clang__)
#define CORE_TENSOR_DUAL_PASS_SIMD
#include <immintrin.h>

namespace core_tensor {

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
inline __m512d widen(const float* p, __mmask8 m) { return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(m, p)); }
inline __m512d widen(const double* p, __mmask8 m) { return _mm512_maskz_loadu_pd(m, p); }
inline __mmask8 first_lanes(int64_t n) { return static_cast<__mmask8>(n >= 8 ? 0xff : (1u << n) - 1u); }

// Eight multipliers by plain loads, which cost less than a gather.
inline __m512d pick(const double* lam, const int32_t* j) {
  __m256d half[2];
  for (int i = 0; i < 2; ++i, j += 4) {
    const __m128d low = _mm_loadh_pd(_mm_load_sd(lam + j[0]), lam + j[1]);
    const __m128d high = _mm_loadh_pd(_mm_load_sd(lam + j[2]), lam + j[3]);
    half[i] = _mm256_insertf128_pd(_mm256_castpd128_pd256(low), high, 1);
  }
  return _mm512_insertf64x4(_mm512_castpd256_pd512(half[0]), half[1], 1);
}

template <class T>
void reduced_costs(const Pass<T>& p, int64_t begin, int64_t count, double* r, double* effective,
                          double& square) {
  const __m512d one = _mm512_set1_pd(1.0), gamma = _mm512_set1_pd(p.gamma);
  __m512d sum = _mm512_setzero_pd();
  for (int64_t k = 0; k < count; k += 8) {
    const __mmask8 m = first_lanes(count - k);
    const int64_t at = begin + k;
    __m512d lam;
    if (k + 8 <= count) {
      lam = pick(p.lam, p.index + at);
    } else {
      const __m256i j = _mm256_maskz_loadu_epi32(m, p.index + at);
      lam = _mm512_mask_i32gather_pd(_mm512_setzero_pd(), m, j, p.lam, 8);
    }
    const __m512d a = p.coefficient ? widen(p.coefficient + at, m) : one;
    const __m512d value = _mm512_fmadd_pd(a, lam, widen(p.cost + at, m));
    _mm512_storeu_pd(r + k, value);
    if (p.anchor) {
      const __m512d before = widen(p.anchor + at, m);
      _mm512_storeu_pd(effective + k, _mm512_fnmadd_pd(gamma, before, value));
      sum = _mm512_fmadd_pd(before, before, sum);
    }
  }
  square += _mm512_reduce_add_pd(sum);
}

inline double least(const double* r, int64_t n) {
  const __m512d infinity = _mm512_set1_pd(core_tensor::kInfinity);
  __m512d low = infinity;
  for (int64_t k = 0; k < n; k += 8)
    low = _mm512_min_pd(low, _mm512_mask_loadu_pd(infinity, first_lanes(n - k), r + k));
  return _mm512_reduce_min_pd(low);
}

inline int64_t candidates(const double* r, int64_t n, double bound, int32_t* at) {
  const __m512d limit = _mm512_set1_pd(bound);
  int64_t count = 0;
  for (int64_t k = 0; k < n; k += 8) {
    const __m512d value = _mm512_loadu_pd(r + k);
    unsigned found = _mm512_mask_cmp_pd_mask(first_lanes(n - k), value, limit, _CMP_LT_OQ);
    for (; found; found &= found - 1) at[count++] = static_cast<int32_t>(k) + __builtin_ctz(found);
  }
  return count;
}

// Least entry and candidates of a block of up to 16 variables, without touching memory twice.
inline unsigned small(const double* r, int64_t n, double reach, bool equality, double& r_min) {
  const __m512d infinity = _mm512_set1_pd(kInfinity);
  const unsigned lanes = (1u << n) - 1u;
  const __m512d a = _mm512_mask_loadu_pd(infinity, static_cast<__mmask8>(lanes), r);
  const __m512d b = _mm512_mask_loadu_pd(infinity, static_cast<__mmask8>(lanes >> 8), r + 8);
  r_min = _mm512_reduce_min_pd(_mm512_min_pd(a, b));
  const __m512d limit = _mm512_set1_pd(equality ? r_min + reach : std::min(r_min + reach, 0.0));
  return _mm512_cmp_pd_mask(a, limit, _CMP_LT_OQ) |
         static_cast<unsigned>(_mm512_cmp_pd_mask(b, limit, _CMP_LT_OQ)) << 8;
}

#include "dual_pass_simplex.inc"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
inline __m256d widen(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline __m256d widen(const double* p) { return _mm256_loadu_pd(p); }

// Four multipliers by plain loads, which cost less than a gather.
inline __m256d pick(const double* lam, const int32_t* j) {
  const __m128d low = _mm_loadh_pd(_mm_load_sd(lam + j[0]), lam + j[1]);
  const __m128d high = _mm_loadh_pd(_mm_load_sd(lam + j[2]), lam + j[3]);
  return _mm256_insertf128_pd(_mm256_castpd128_pd256(low), high, 1);
}

// Costs c + A'lam, and with an anchor c + A'lam - gamma p, of variables [begin, begin + count).
template <bool weighted, bool anchored, class T>
void reduced_costs(const Pass<T>& p, int64_t begin, int64_t count, double* __restrict__ r,
                   double* __restrict__ effective, double& square) {
  const int32_t* __restrict__ index = p.index + begin;
  const T* __restrict__ cost = p.cost + begin;
  const T* __restrict__ coefficient = weighted ? p.coefficient + begin : nullptr;
  const T* __restrict__ anchor = anchored ? p.anchor + begin : nullptr;
  const double* __restrict__ lam = p.lam;
  const __m256d gamma = _mm256_set1_pd(p.gamma);
  __m256d sum = _mm256_setzero_pd();
  const auto four = [&](int64_t k) CT_INLINE_LAMBDA {
    const __m256d price = pick(lam, index + k), c = widen(cost + k);
    const __m256d value = weighted ? _mm256_fmadd_pd(widen(coefficient + k), price, c) : _mm256_add_pd(price, c);
    _mm256_storeu_pd(r + k, value);
    if (anchored) {
      const __m256d before = widen(anchor + k);
      _mm256_storeu_pd(effective + k, _mm256_fnmadd_pd(gamma, before, value));
      sum = _mm256_fmadd_pd(before, before, sum);
    }
  };
  int64_t k = 0;
  for (; k + 16 <= count; k += 16)
    for (int64_t i = 0; i < 16; i += 4) four(k + i);
  for (; k + 4 <= count; k += 4) four(k);
  double rest = 0.0;
  for (; k < count; ++k) {
    const double a = weighted ? static_cast<double>(coefficient[k]) : 1.0;
    r[k] = __builtin_fma(a, lam[index[k]], static_cast<double>(cost[k]));
    if (anchored) {
      const double before = static_cast<double>(anchor[k]);
      effective[k] = __builtin_fma(-p.gamma, before, r[k]);
      rest += before * before;
    }
  }
  alignas(32) double lane[4];
  _mm256_store_pd(lane, sum);
  square += rest + ((lane[0] + lane[2]) + (lane[1] + lane[3]));
}

template <class T>
void reduced_costs(const Pass<T>& p, int64_t begin, int64_t count, double* r, double* effective, double& square) {
  const auto form = p.coefficient ? (p.anchor ? reduced_costs<true, true, T> : reduced_costs<true, false, T>)
                                  : (p.anchor ? reduced_costs<false, true, T> : reduced_costs<false, false, T>);
  form(p, begin, count, r, effective, square);
}

// Read from 16 - n on: n times zero, then NaN.
alignas(32) constexpr int64_t kLanes[32] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                            -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

inline double least(__m256d v) {
  const __m128d half = _mm_min_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_min_sd(half, _mm_unpackhi_pd(half, half)));
}

inline double least(const double* r, int64_t n) {
  __m256d low = _mm256_set1_pd(kInfinity);
  int64_t k = 0;
  for (; k + 4 <= n; k += 4) low = _mm256_min_pd(_mm256_loadu_pd(r + k), low);
  const double* beyond = reinterpret_cast<const double*>(kLanes) + 16 - (n - k);
  return least(_mm256_min_pd(_mm256_or_pd(_mm256_loadu_pd(r + k), _mm256_loadu_pd(beyond)), low));
}

inline int64_t candidates(const double* r, int64_t n, double bound, int32_t* at) {
  int64_t count = 0;
  for (int64_t k = 0; k < n; ++k) {
    at[count] = static_cast<int32_t>(k);
    count += r[k] < bound;
  }
  return count;
}

// Least entry and candidates of a block of up to 16 variables, without touching memory twice. Lanes behind the block
// become NaN, which `min` and `<` pass over.
inline unsigned small(const double* r, int64_t n, double reach, bool equality, double& r_min) {
  const double* beyond = reinterpret_cast<const double*>(kLanes) + 16 - n;
  __m256d v[4], low = _mm256_set1_pd(kInfinity);
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_or_pd(_mm256_loadu_pd(r + 4 * i), _mm256_loadu_pd(beyond + 4 * i));
    low = _mm256_min_pd(v[i], low);
  }
  r_min = least(low);
  const __m256d limit = _mm256_set1_pd(equality ? r_min + reach : std::min(r_min + reach, 0.0));
  unsigned found = 0;
  for (int i = 0; i < 4; ++i)
    found |= static_cast<unsigned>(_mm256_movemask_pd(_mm256_cmp_pd(v[i], limit, _CMP_LT_OQ))) << (4 * i);
  return found;
}

#include "dual_pass_simplex.inc"
}  // namespace avx2
#pragma GCC pop_options

}  // namespace core_tensor
#endif

// The dual pass for simplices with one row per variable, by vectors: AVX-512 and AVX2.
// What differs between the two widths stands here; the pass itself is in dual_pass_simplex.inc.
#pragma once
#include <cstring>

#include "core.h"
#include "dual_pass.h"

#if defined(CORE_TENSOR_X86_LEVELS) && defined(__x86_64__) && !defined(__clang__)
#define CORE_TENSOR_DUAL_PASS_SIMD
#include <immintrin.h>

namespace core_tensor {

// Two rows of two neighboring variables, in one load: loads are what a pass waits for.
struct RowPair {
  uint64_t both;
  explicit RowPair(const int32_t* index) { std::memcpy(&both, index, sizeof both); }
  CT_INLINE uint32_t low() const { return static_cast<uint32_t>(both); }
  CT_INLINE uint64_t high() const { return both >> 32; }
};

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
typedef double Vector __attribute__((vector_size(64)));
typedef int64_t Whole __attribute__((vector_size(64)));

inline Vector load(const double* p) { return _mm512_loadu_pd(p); }
inline Vector widen(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline Vector widen(const double* p) { return _mm512_loadu_pd(p); }
inline void store(double* p, Vector v) { _mm512_storeu_pd(p, v); }
inline void store_where(Whole mask, double* p, Vector v) {
  _mm512_mask_storeu_pd(p, _mm512_movepi64_mask(reinterpret_cast<__m512i>(mask)), v);
}
inline double sum(Vector v) { return _mm512_reduce_add_pd(v); }
inline unsigned bits(Whole mask) { return _mm512_movepi64_mask(reinterpret_cast<__m512i>(mask)); }
inline __mmask8 first_lanes(int64_t n) { return static_cast<__mmask8>(n >= 8 ? 0xff : (1u << n) - 1u); }

// a0 b0 a1 b1 ...
inline void interleave(Vector a, Vector b, double* out) {
  _mm512_store_pd(out, _mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b));
  _mm512_store_pd(out + 8, _mm512_permutex2var_pd(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b));
}

// Eight multipliers by plain loads, which cost less than a gather.
inline Vector pick(const double* lam, const int32_t* index) {
  __m256d half[2];
  for (int i = 0; i < 2; ++i, index += 4) {
    const RowPair a(index), b(index + 2);
    const __m128d low = _mm_loadh_pd(_mm_load_sd(lam + a.low()), lam + a.high());
    const __m128d high = _mm_loadh_pd(_mm_load_sd(lam + b.low()), lam + b.high());
    half[i] = _mm256_insertf128_pd(_mm256_castpd128_pd256(low), high, 1);
  }
  return _mm512_insertf64x4(_mm512_castpd256_pd512(half[0]), half[1], 1);
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

// Least of the first 16 entries of a block, and which of them lie below both `top` and that plus `reach`.
CT_INLINE unsigned small(const double* r, int64_t n, double reach, double top, double& r_min) {
  const __m512d infinity = _mm512_set1_pd(kInfinity);
  const unsigned lanes = _bzhi_u32(0xffffu, static_cast<unsigned>(std::min<int64_t>(n, 16)));
  const __m512d a = _mm512_mask_loadu_pd(infinity, static_cast<__mmask8>(lanes), r);
  const __m512d b = _mm512_mask_loadu_pd(infinity, static_cast<__mmask8>(lanes >> 8), r + 8);
  __m512d low = _mm512_min_pd(a, b);  // in every lane in the end: no way through a scalar
  low = _mm512_min_pd(low, _mm512_shuffle_f64x2(low, low, 0x4e));
  low = _mm512_min_pd(low, _mm512_shuffle_f64x2(low, low, 0xb1));
  low = _mm512_min_pd(low, _mm512_permute_pd(low, 0x55));
  r_min = _mm512_cvtsd_f64(low);
  const __m512d limit = _mm512_min_pd(_mm512_add_pd(low, _mm512_set1_pd(reach)), _mm512_set1_pd(top));
  return _mm512_kunpackb(_mm512_cmp_pd_mask(b, limit, _CMP_LT_OQ), _mm512_cmp_pd_mask(a, limit, _CMP_LT_OQ));
}

#include "dual_pass_simplex.inc"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
typedef double Vector __attribute__((vector_size(32)));
typedef int64_t Whole __attribute__((vector_size(32)));

inline Vector load(const double* p) { return _mm256_loadu_pd(p); }
inline Vector widen(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline Vector widen(const double* p) { return _mm256_loadu_pd(p); }
inline void store(double* p, Vector v) { _mm256_storeu_pd(p, v); }

inline void store_where(Whole mask, double* p, Vector v) {
  _mm256_maskstore_pd(p, reinterpret_cast<__m256i>(mask), v);
}
inline double sum(Vector v) {
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}
inline unsigned bits(Whole mask) {
  return static_cast<unsigned>(_mm256_movemask_pd(reinterpret_cast<__m256d>(mask)));
}

// a0 b0 a1 b1 ...
inline void interleave(Vector a, Vector b, double* out) {
  const __m256d low = _mm256_unpacklo_pd(a, b), high = _mm256_unpackhi_pd(a, b);
  _mm256_store_pd(out, _mm256_permute2f128_pd(low, high, 0x20));
  _mm256_store_pd(out + 4, _mm256_permute2f128_pd(low, high, 0x31));
}

// Four multipliers by plain loads, which cost less than a gather.
inline Vector pick(const double* lam, const int32_t* index) {
  const RowPair a(index), b(index + 2);
  const __m128d low = _mm_loadh_pd(_mm_load_sd(lam + a.low()), lam + a.high());
  const __m128d high = _mm_loadh_pd(_mm_load_sd(lam + b.low()), lam + b.high());
  return _mm256_insertf128_pd(_mm256_castpd128_pd256(low), high, 1);
}

// Read from 16 - n on: n times zero, then NaN.
alignas(32) constexpr int64_t kLanes[32] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                            -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

inline double least(const double* r, int64_t n) {
  __m256d low = _mm256_set1_pd(kInfinity);
  int64_t k = 0;
  for (; k + 4 <= n; k += 4) low = _mm256_min_pd(_mm256_loadu_pd(r + k), low);
  const double* beyond = reinterpret_cast<const double*>(kLanes) + 16 - (n - k);
  low = _mm256_min_pd(_mm256_or_pd(_mm256_loadu_pd(r + k), _mm256_loadu_pd(beyond)), low);
  const __m128d half = _mm_min_pd(_mm256_castpd256_pd128(low), _mm256_extractf128_pd(low, 1));
  return _mm_cvtsd_f64(_mm_min_sd(half, _mm_unpackhi_pd(half, half)));
}

inline int64_t candidates(const double* r, int64_t n, double bound, int32_t* at) {
  int64_t count = 0;
  for (int64_t k = 0; k < n; ++k) {
    at[count] = static_cast<int32_t>(k);
    count += r[k] < bound;
  }
  return count;
}

// Least of the first 16 entries of a block, and which of them lie below both `top` and that plus `reach`. Lanes behind
// the block become NaN, which `min` and `<` pass over.
CT_INLINE unsigned small(const double* r, int64_t n, double reach, double top, double& r_min) {
  const double* beyond = reinterpret_cast<const double*>(kLanes) + 16 - std::min<int64_t>(n, 16);
  __m256d v[4], low = _mm256_set1_pd(kInfinity);
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_or_pd(_mm256_loadu_pd(r + 4 * i), _mm256_loadu_pd(beyond + 4 * i));
    low = _mm256_min_pd(v[i], low);
  }
  low = _mm256_min_pd(low, _mm256_permute2f128_pd(low, low, 1));  // in every lane in the end
  low = _mm256_min_pd(low, _mm256_permute_pd(low, 5));
  r_min = _mm256_cvtsd_f64(low);
  const __m256d limit = _mm256_min_pd(_mm256_add_pd(low, _mm256_set1_pd(reach)), _mm256_set1_pd(top));
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

// One evaluation of the smoothed dual: per block r = c + A'lam, x = projection, then A x, per-row c x and totals.
// Every sum is taken inside fixed chunks of blocks and then added as a 64-bit fixed-point number, so the result does
// not depend on the number of threads, nor on how whole chunks are dealt out to processes.
#include <cstring>
#include <new>
#include <vector>

#include "blocks.h"
#include "core.h"

#if defined(CORE_TENSOR_X86_LEVELS) && defined(__x86_64__) && !defined(__clang__)
#define CORE_TENSOR_AVX512
#include <immintrin.h>
#endif

namespace {

using core_tensor::Block;
using core_tensor::Family;
using core_tensor::Support;

enum Total { kCost, kSquare, kLeast, kFractional, kNonzero, kTotals };

template <class T>
struct Pass {
  const int64_t* offsets;
  const int32_t* index;  // (variables, rows_per_variable)
  const T* cost;
  const T* coefficient;  // same shape as index, or null for ones
  const double* lam;
  const T* anchor;       // proximal centre, or null
  const double* shrink;  // factor per row applied to x, or null
  double* x_out;         // dense projection, or null
  double gamma;
  int64_t base, rows, rows_per_variable;
  Family<T> family;
};

struct Scratch {
  std::vector<double> r, effective, x;
  std::vector<int32_t> at;
  std::vector<std::pair<double, int32_t>> order;
  explicit Scratch(int64_t longest)
      : r(longest + 8), effective(longest + 8), x(longest + 1), at(longest + 1), order(longest + 1) {}
};

constexpr int64_t kTile = 2048;  // variables whose reduced costs are formed at once: they stay in the first cache

template <class T>
CT_CLONES void reduced_costs(const Pass<T>& p, int64_t begin, int64_t count, double* __restrict__ r) {
  const int32_t* __restrict__ index = p.index + begin * p.rows_per_variable;
  const T* __restrict__ cost = p.cost + begin;
  const double* __restrict__ lam = p.lam;
  if (p.rows_per_variable == 1 && p.coefficient) {
    const T* __restrict__ a = p.coefficient + begin;
    for (int64_t k = 0; k < count; ++k)
      r[k] = static_cast<double>(cost[k]) + static_cast<double>(a[k]) * lam[index[k]];
    return;
  }
  for (int64_t k = 0; k < count; ++k) {
    double sum = static_cast<double>(cost[k]);
    for (int64_t i = 0; i < p.rows_per_variable; ++i) {
      const int64_t e = k * p.rows_per_variable + i;
      const double a = p.coefficient ? static_cast<double>(p.coefficient[begin * p.rows_per_variable + e]) : 1.0;
      sum += a * lam[index[e]];
    }
    r[k] = sum;
  }
}

template <class T>
inline double shrink_of(const Pass<T>& p, int64_t variable) {
  double factor = 1.0;
  for (int64_t i = 0; i < p.rows_per_variable; ++i) {
    const int64_t e = variable * p.rows_per_variable + i;
    if (!p.coefficient || p.coefficient[e] != T{0}) factor = std::min(factor, p.shrink[p.index[e]]);
  }
  return factor;
}

// Adds a projected block to the chunk's sums: sums[2 j] is row j of A x, sums[2 j + 1] the cost spent in row j.
template <class T>
inline void scatter(const Pass<T>& p, int64_t first, const Support& out, double* sums, double* totals) {
  for (int64_t i = 0; i < out.count; ++i) {
    const int64_t k = first + out.at[i];
    const double x = p.shrink ? out.x[i] * shrink_of(p, k) : out.x[i], spent = static_cast<double>(p.cost[k]) * x;
    totals[kCost] += spent;
    if (p.rows_per_variable == 1) {
      const int64_t j = p.index[k];
      sums[2 * j] += p.coefficient ? static_cast<double>(p.coefficient[k]) * x : x;
      sums[2 * j + 1] += spent;
    } else {
      for (int64_t e = k * p.rows_per_variable; e < (k + 1) * p.rows_per_variable; ++e)
        sums[2 * p.index[e]] += p.coefficient ? static_cast<double>(p.coefficient[e]) * x : x;
    }
    if (p.x_out) p.x_out[k - p.base] = x;
    if (!p.anchor) totals[kSquare] += x * x;
  }
  if (p.anchor) {  // ||x - x_prev||^2 = sum over all of x_prev^2, corrected where x is not zero
    for (int64_t i = 0; i < out.count; ++i) {
      const int64_t k = first + out.at[i];
      const double before = static_cast<double>(p.anchor[k]), x = p.shrink ? out.x[i] * shrink_of(p, k) : out.x[i];
      totals[kSquare] += x * (x - 2.0 * before);
    }
  }
  totals[kNonzero] += static_cast<double>(out.count);
}

// Blocks [block, stop) whose reduced costs fit one tile.
template <class T>
inline int64_t tile_end(const Pass<T>& p, int64_t block, int64_t end) {
  int64_t stop = block + 1;
  while (stop < end && p.offsets[stop + 1] - p.offsets[block] <= kTile) ++stop;
  return stop;
}

template <class T>
CT_CLONES void pass_chunk(const Pass<T>& p, int64_t begin, int64_t end, Scratch& s, double* sums, double* totals) {
  const bool simplex = p.family.is_simplex();
  for (int64_t block = begin; block < end;) {
    const int64_t stop = tile_end(p, block, end), tile = p.offsets[block];
    const int64_t count = p.offsets[stop] - tile;
    reduced_costs(p, tile, count, s.r.data());
    const double* effective = s.r.data();
    if (p.anchor) {
      double square = 0.0;
      for (int64_t k = 0; k < count; ++k) {
        const double before = static_cast<double>(p.anchor[tile + k]);
        s.effective[k] = s.r[k] - p.gamma * before;
        square += before * before;
      }
      totals[kSquare] += square;
      effective = s.effective.data();
    }
    for (; block < stop; ++block) {
      const int64_t first = p.offsets[block], n = p.offsets[block + 1] - first;
      const double* r = s.r.data() + (first - tile);
      const double* e = effective + (first - tile);
      const double cap = p.family.cap[block * p.family.cap_stride];
      Support out{s.at.data(), s.x.data(), 0};
      const Block<T> shape{p.family, first, cap};
      double least = 0.0;
      if (simplex) {
        core_tensor::project_simplex<T>(e, n, p.gamma, cap, p.family.equality, out, least);
        if (p.anchor) {
          double r_min = p.family.equality ? core_tensor::kInfinity : 0.0;
          for (int64_t k = 0; k < n; ++k) r_min = std::min(r_min, r[k]);
          least = n > 0 ? cap * r_min : 0.0;
        }
        totals[kFractional] += out.count > 1 || (out.count == 1 && out.x[0] < cap * (1.0 - 1e-12));
      } else {
        core_tensor::project_capped(shape, e, n, p.gamma, out);
        least = core_tensor::least_value(shape, r, n, s.order.data());
        totals[kFractional] += !core_tensor::at_vertex(shape, out);
      }
      if (n > 0) totals[kLeast] += least;
      scatter(p, first, out, sums, totals);
    }
  }
}

#ifdef CORE_TENSOR_AVX512
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
// The same pass for simplices with one row per variable, eight variables at a time. Tiles are read straight through,
// so gathers are always full; blocks then find their least entry and their candidates with masked loads.
inline __m512d widen(const float* p, __mmask8 m) { return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(m, p)); }
inline __m512d widen(const double* p, __mmask8 m) { return _mm512_maskz_loadu_pd(m, p); }
inline __mmask8 first_lanes(int64_t n) { return static_cast<__mmask8>(n >= 8 ? 0xff : (1u << n) - 1u); }

template <class T>
void reduced_costs_avx512(const Pass<T>& p, int64_t begin, int64_t count, double* r, double* effective,
                          double& square) {
  const __m512d one = _mm512_set1_pd(1.0), gamma = _mm512_set1_pd(p.gamma);
  __m512d sum = _mm512_setzero_pd();
  for (int64_t k = 0; k < count; k += 8) {
    const __mmask8 m = first_lanes(count - k);
    const int64_t at = begin + k;
    const __m256i j = _mm256_maskz_loadu_epi32(m, p.index + at);
    const __m512d lam = _mm512_mask_i32gather_pd(_mm512_setzero_pd(), m, j, p.lam, 8);
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

inline double least_avx512(const double* r, int64_t n) {
  const __m512d infinity = _mm512_set1_pd(core_tensor::kInfinity);
  __m512d low = infinity;
  for (int64_t k = 0; k < n; k += 8)
    low = _mm512_min_pd(low, _mm512_mask_loadu_pd(infinity, first_lanes(n - k), r + k));
  return _mm512_reduce_min_pd(low);
}

inline int64_t candidates_avx512(const double* r, int64_t n, double bound, int32_t* at) {
  const __m512d limit = _mm512_set1_pd(bound);
  int64_t count = 0;
  for (int64_t k = 0; k < n; k += 8) {
    const __m512d value = _mm512_loadu_pd(r + k);
    unsigned found = _mm512_mask_cmp_pd_mask(first_lanes(n - k), value, limit, _CMP_LT_OQ);
    for (; found; found &= found - 1) at[count++] = static_cast<int32_t>(k) + __builtin_ctz(found);
  }
  return count;
}

// Adds one variable at amount x, as `scatter` does for a support.
template <class T>
inline void scatter_one(const Pass<T>& p, int64_t k, double x, double* sums, double& cost, double& square) {
  if (p.shrink) x *= shrink_of(p, k);
  const int64_t j = p.index[k];
  const double spent = static_cast<double>(p.cost[k]) * x;
  sums[2 * j] += p.coefficient ? static_cast<double>(p.coefficient[k]) * x : x;
  sums[2 * j + 1] += spent;
  cost += spent;
  square += x * (x - (p.anchor ? 2.0 * static_cast<double>(p.anchor[k]) : 0.0));
  if (p.x_out) p.x_out[k - p.base] = x;
}

template <class T>
void pass_chunk_avx512(const Pass<T>& p, int64_t begin, int64_t end, Scratch& s, double* sums, double* totals) {
  const bool equality = p.family.equality, anchored = p.anchor != nullptr;
  const __m512d infinity = _mm512_set1_pd(core_tensor::kInfinity);
  double cost = 0.0, square = 0.0, total_least = 0.0;
  int64_t fractional = 0, nonzero = 0;
  for (int64_t block = begin; block < end;) {
    const int64_t stop = tile_end(p, block, end), tile = p.offsets[block];
    reduced_costs_avx512(p, tile, p.offsets[stop] - tile, s.r.data(), s.effective.data(), square);
    const double* effective = anchored ? s.effective.data() : s.r.data();
    for (; block < stop; ++block) {
      const int64_t first = p.offsets[block], n = p.offsets[block + 1] - first;
      if (n == 0) continue;
      const double* r = effective + (first - tile);
      const double cap = p.family.cap[block * p.family.cap_stride], reach = p.gamma * cap;
      double r_min;
      unsigned found = 0;
      const bool small = n <= 16;
      if (small) {  // both vectors stay in registers
        const unsigned lanes = (1u << n) - 1u;
        const __m512d a = _mm512_mask_loadu_pd(infinity, static_cast<__mmask8>(lanes), r);
        const __m512d b = _mm512_mask_loadu_pd(infinity, static_cast<__mmask8>(lanes >> 8), r + 8);
        r_min = _mm512_reduce_min_pd(_mm512_min_pd(a, b));
        const __m512d limit = _mm512_set1_pd(equality ? r_min + reach : std::min(r_min + reach, 0.0));
        found = _mm512_cmp_pd_mask(a, limit, _CMP_LT_OQ);
        found |= static_cast<unsigned>(_mm512_cmp_pd_mask(b, limit, _CMP_LT_OQ)) << 8;
      } else {
        r_min = least_avx512(r, n);
      }
      const double least = anchored ? least_avx512(s.r.data() + (first - tile), n) : r_min;
      total_least += cap * (equality ? least : std::min(least, 0.0));
      if (small && (found & (found - 1)) == 0 && !(found == 0 && equality)) {
        if (found == 0) continue;
        double x = cap;
        if (!equality && -r_min < reach) {
          x = -r_min / p.gamma;
          fractional += x < cap * (1.0 - 1e-12);
        }
        ++nonzero;
        scatter_one(p, first + __builtin_ctz(found), x, sums, cost, square);
        continue;
      }
      Support out{s.at.data(), s.x.data(), 0};
      const double bound = equality ? r_min + reach : std::min(r_min + reach, 0.0);
      out.count = candidates_avx512(r, n, bound, out.at);
      if (out.count == 0 && equality && cap > 0)  // gamma z is below the spacing of floats at r_min
        out.at[out.count++] = static_cast<int32_t>(std::find(r, r + n, r_min) - r);
      if (out.count == 0) continue;
      core_tensor::finish_simplex(r, r_min, p.gamma, cap, equality, out);
      fractional += out.count > 1 || out.x[0] < cap * (1.0 - 1e-12);
      nonzero += out.count;
      for (int64_t i = 0; i < out.count; ++i) scatter_one(p, first + out.at[i], out.x[i], sums, cost, square);
    }
  }
  totals[kCost] += cost;
  totals[kSquare] += square;
  totals[kLeast] += total_least;
  totals[kFractional] += static_cast<double>(fractional);
  totals[kNonzero] += static_cast<double>(nonzero);
}
#pragma GCC pop_options
#endif

template <class T>
void chunk(const Pass<T>& p, int64_t begin, int64_t end, Scratch& s, double* sums, double* totals) {
#ifdef CORE_TENSOR_AVX512
  const bool wide = ct_level() == 4;
  if (wide && p.family.is_simplex() && p.rows_per_variable == 1) {
    pass_chunk_avx512(p, begin, end, s, sums, totals);
    return;
  }
#endif
  pass_chunk(p, begin, end, s, sums, totals);
}

template <class T>
void run(const Pass<T>& p, const int64_t* bounds, int64_t chunks, const double* scale, int64_t* result, int threads) {
  int64_t longest = kTile;
  for (int64_t b = bounds[0]; b < bounds[chunks]; ++b) longest = std::max(longest, p.offsets[b + 1] - p.offsets[b]);
  const int64_t width = 2 * p.rows + kTotals;
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(longest);
    std::vector<double> sums(width);
    std::vector<int64_t> mine(width, 0);
#pragma omp for schedule(dynamic, 1)
    for (int64_t c = 0; c < chunks; ++c) {
      std::fill(sums.begin(), sums.end(), 0.0);
      chunk(p, bounds[c], bounds[c + 1], scratch, sums.data(), sums.data() + 2 * p.rows);
      for (int64_t j = 0; j < width; ++j) mine[j] += std::llrint(sums[j] * scale[j]);
    }
#pragma omp critical
    for (int64_t j = 0; j < width; ++j) result[j] += mine[j];  // whole numbers: any order gives the same sum
  }
}

template <class T>
void dual_pass(const int64_t* offsets, const int32_t* index, const T* cost, const T* coefficient, const double* lam,
               const double* cap, const T* upper, const T* weight, const T* anchor, const double* shrink,
               const double* scale, const int64_t* bounds, int64_t* result, double* x_out, int64_t base, int64_t rows,
               int64_t rows_per_variable, int64_t chunks, int64_t cap_stride, int64_t upper_stride, double gamma,
               int equality, int threads) {
  // Slices of a problem keep the offsets of the whole; `base` is the first variable that the arrays hold.
  const Pass<T> p{offsets,
                  index - base * rows_per_variable,
                  cost - base,
                  coefficient ? coefficient - base * rows_per_variable : nullptr,
                  lam,
                  anchor ? anchor - base : nullptr,
                  shrink,
                  x_out,
                  gamma,
                  base,
                  rows,
                  rows_per_variable,
                  {cap, cap_stride, upper ? upper - base * upper_stride : nullptr, upper_stride,
                   weight ? weight - base : nullptr, equality != 0}};
  run(p, bounds, chunks, scale, result, threads);
}

}  // namespace

#define CT_DUAL_PASS(NAME, T)                                                                                          \
  CT_EXPORT void NAME(const int64_t* offsets, const int32_t* index, const T* cost, const T* coefficient,              \
                      const double* lam, const double* cap, const T* upper, const T* weight, const T* anchor,         \
                      const double* shrink, const double* scale, const int64_t* bounds, int64_t* result,              \
                      double* x_out, int64_t base, int64_t rows, int64_t rows_per_variable, int64_t chunks,           \
                      int64_t cap_stride, int64_t upper_stride, double gamma, int equality, int threads) {            \
    dual_pass<T>(offsets, index, cost, coefficient, lam, cap, upper, weight, anchor, shrink, scale, bounds, result,   \
                 x_out, base, rows, rows_per_variable, chunks, cap_stride, upper_stride, gamma, equality, threads);   \
  }
CT_DUAL_PASS(ct_dual_pass_f32, float)
CT_DUAL_PASS(ct_dual_pass_f64, double)

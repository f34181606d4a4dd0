// One evaluation of the smoothed dual: per block r = c + A'lam, x = projection, then A x, per-row c x and totals.
// Every sum is taken inside fixed chunks of blocks and then added as a 64-bit fixed-point number, so the result does
// not depend on the number of threads, nor on how whole chunks are dealt out to processes.
#include <cmath>
#include <cstring>
#include <vector>

#include "core.h"
#include "dual_pass.h"
#include "dual_pass_simd.h"

namespace {

using namespace core_tensor;

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
        project_simplex<T>(e, n, p.gamma, cap, p.family.equality, out, least);
        if (p.anchor) {
          double r_min = p.family.equality ? kInfinity : 0.0;
          for (int64_t k = 0; k < n; ++k) r_min = std::min(r_min, r[k]);
          least = n > 0 ? cap * r_min : 0.0;
        }
        totals[kFractional] += out.count > 1 || (out.count == 1 && out.x[0] < cap * (1.0 - 1e-12));
      } else {
        project_capped(shape, e, n, p.gamma, out);
        least = least_value(shape, r, n, s.order.data());
        totals[kFractional] += !at_vertex(shape, out);
      }
      if (n > 0) totals[kLeast] += least;
      scatter(p, first, out, sums, totals);
    }
  }
}


template <class T>
void chunk(const Pass<T>& p, int64_t begin, int64_t end, Scratch& s, double* sums, double* totals) {
#ifdef CORE_TENSOR_DUAL_PASS_SIMD
  if (p.family.is_simplex() && p.rows_per_variable == 1 && ct_level() >= 3) {
    (ct_level() == 4 ? avx512::pass_chunk<T> : avx2::pass_chunk<T>)(p, begin, end, s, sums, totals);
    return;
  }
#endif
  pass_chunk(p, begin, end, s, sums, totals);
}

CT_CLONES int64_t longest_block(const int64_t* __restrict__ offsets, int64_t begin, int64_t end) {
  int64_t longest = 0;
  for (int64_t b = begin; b < end; ++b) longest = std::max(longest, offsets[b + 1] - offsets[b]);
  return longest;
}

CT_INLINE uint64_t bits_of(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The whole number nearest to a value below 2^63 in size (ties to even), by halves of 32 bits: adding 1.5 * 2^52 rounds,
// and leaves the whole number in the low bits. Unlike a conversion, that runs in vectors without AVX-512.
CT_INLINE int64_t nearest_whole(double value) {
  constexpr double kShift = 0x1.8p52;
  const double high = value * 0x1p-32 + kShift, low = (value - (high - kShift) * 0x1p32) + kShift;
  return static_cast<int64_t>(((bits_of(high) - bits_of(kShift)) << 32) + (bits_of(low) - bits_of(kShift)));
}

// Adds whole numbers; negative if a sum has no room in 64 bits.
CT_CLONES int64_t add_whole(const int64_t* __restrict__ numbers, int64_t count, int64_t* __restrict__ total) {
  int64_t overflow = 0;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t before = total[j], after = wrapping_sum(before, numbers[j]);
    overflow |= (before ^ after) & (numbers[j] ^ after);  // both signs differ from the sum's
    total[j] = after;
  }
  return overflow;
}

// Adds a chunk's sums as whole numbers; returns whether all have room in 64 bits. The sums are used up.
CT_CLONES bool add_fixed(double* __restrict__ sums, const double* __restrict__ scale, int64_t width,
                         int64_t* __restrict__ total) {
  for (int64_t j = 0; j < width; ++j) sums[j] *= scale[j];  // apart, so that no product is fused and rounds differently
  int64_t overflow = 0, outside = 0;
  for (int64_t j = 0; j < width; ++j) {
    const double value = sums[j];
    const int64_t number = nearest_whole(value), before = total[j], after = wrapping_sum(before, number);
    outside |= std::abs(value) < 0x1p63 ? 0 : -1;
    overflow |= (before ^ after) & (number ^ after);
    total[j] = after;
  }
  return overflow >= 0 && outside == 0;
}

template <class T>
int run(const Pass<T>& p, const int64_t* bounds, int64_t chunks, const double* scale, int64_t* result, int threads) {
  const int64_t longest = std::max(kTile, longest_block(p.offsets, bounds[0], bounds[chunks]));
  const int64_t width = 2 * p.rows + kTotals;
  int refused = 0;
#pragma omp parallel num_threads(threads) reduction(| : refused)
  {
    Scratch scratch(longest);
    std::vector<double> sums(width);
    std::vector<int64_t> mine(width, 0);
#pragma omp for schedule(dynamic, 1)
    for (int64_t c = 0; c < chunks; ++c) {
      std::fill(sums.begin(), sums.end(), 0.0);
      chunk(p, bounds[c], bounds[c + 1], scratch, sums.data(), sums.data() + 2 * p.rows);
      refused |= !add_fixed(sums.data(), scale, width, mine.data());
    }
#pragma omp critical
    refused |= add_whole(mine.data(), width, result) < 0;  // whole numbers: any order gives the same sum
  }
  return !refused;
}

template <class T>
int dual_pass(const int64_t* offsets, const int32_t* index, const T* cost, const T* coefficient, const double* lam,
              const double* cap, const T* upper, const T* weight, const T* anchor, const double* shrink,
              const double* scale, const int64_t* bounds, int64_t* result, double* x_out, int64_t rows,
              int64_t rows_per_variable, int64_t chunks, int64_t cap_stride, int64_t upper_stride, double gamma,
              int equality, int threads) {
  const Family<T> family{cap, cap_stride, upper, upper_stride, weight, equality != 0};
  const Pass<T> p{offsets, index, cost, coefficient, lam, anchor, shrink, x_out, gamma, rows, rows_per_variable, family};
  return run(p, bounds, chunks, scale, result, threads);
}

}  // namespace

// Returns 1, or 0 if a sum has no room in 64 bits.
#define CT_DUAL_PASS(NAME, T)                                                                                          \
  CT_EXPORT int NAME(const int64_t* offsets, const int32_t* index, const T* cost, const T* coefficient,                \
                     const double* lam, const double* cap, const T* upper, const T* weight, const T* anchor,           \
                     const double* shrink, const double* scale, const int64_t* bounds, int64_t* result,                \
                     double* x_out, int64_t rows, int64_t rows_per_variable, int64_t chunks,                           \
                     int64_t cap_stride, int64_t upper_stride, double gamma, int equality, int threads) {              \
    return dual_pass<T>(offsets, index, cost, coefficient, lam, cap, upper, weight, anchor, shrink, scale, bounds,     \
                        result, x_out, rows, rows_per_variable, chunks, cap_stride, upper_stride, gamma,               \
                        equality, threads);                                                                            \
  }
CT_DUAL_PASS(ct_dual_pass_f32, float)
CT_DUAL_PASS(ct_dual_pass_f64, double)

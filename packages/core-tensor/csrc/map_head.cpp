// MAP vectors of many small logistic models and the adjoints of their optimality conditions (see core_tensor/map_head).
// A task is solved by one thread in float64, in buffers that stay in the first cache. Rows are widened to whole vectors of
// four doubles, and tasks to whole groups of four rows; what is added is zero, with a one on the precision's diagonal, so
// the unknowns behind the width stay at zero.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core.h"

namespace {

constexpr int kWidest = 32;
constexpr double kSmall = 1.0;       // up to this largest change of a logit the whole Newton step is safe
template <class T>
constexpr double kConverged = sizeof(T) == 4 ? 3e-5 : 1e-6;  // of a logit: the step after it changes some square of it

typedef double Vec __attribute__((vector_size(32)));
typedef uint64_t Bits __attribute__((vector_size(32)));

CT_INLINE Vec load(const double* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
CT_INLINE void store(double* to, Vec v) { std::memcpy(to, &v, sizeof v); }
CT_INLINE double total(Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }

template <class T>
struct Batch {
  const T *h, *base, *y, *w;
  const int64_t* lengths;
  const T *mu, *P;
  int64_t tasks, rows, d;
};

struct Space {  // buffers of one thread; the rows are those of the longest task, in whole groups of four
  int64_t width;
  std::vector<double> h, base, y, w, z, along, p;
  Space(int64_t rows, int64_t width)
      : width(width), h(rows * width), base(rows), y(rows), w(rows), z(rows), along(rows), p(rows) {}
};

// exp(x) for x <= 0, to an ulp or so: 2^n times the Taylor polynomial of the rest, which is at most log(2) / 2.
CT_INLINE Vec exp_negative(Vec x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: what is added to it is rounded to an integer
  constexpr double kTaylor[] = {1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0,
                                1 / 40320.0,      1 / 5040.0,      1 / 720.0,      1 / 120.0,     1 / 24.0,
                                1 / 6.0,          1 / 2.0,         1.0,            1.0};
  x = x > -708.0 ? x : Vec{} - 708.0;  // below it the result would be denormal
  const Vec shifted = x * 1.4426950408889634 + kShift, n = shifted - kShift;
  const Vec r = (x - n * 0x1.62e42fefa38p-1) - n * 0x1.ef35793c7673p-45;
  Vec value = Vec{} + kTaylor[0];
  for (int k = 1; k < 14; ++k) value = value * r + kTaylor[k];
  return value * (Vec)(((Bits)shifted << 52) + (Bits)(Vec{} + 1.0));
}
CT_INLINE Vec sigmoid(Vec z) {
  const Vec q = exp_negative(z < 0.0 ? z : -z);
  return (z < 0.0 ? q : Vec{} + 1.0) / (1.0 + q);
}
CT_INLINE double softplus(double z) { return std::max(z, 0.0) + std::log1p(std::exp(-std::fabs(z))); }

CT_INLINE double dot(const double* a, const double* b, int64_t width) {
  Vec sum = {};
  for (int64_t j = 0; j < width; j += 4) sum += load(a + j) * load(b + j);
  return total(sum);
}

// Products of four rows with x, from one column on.
CT_INLINE Vec four_dots(const double* rows, const double* x, int64_t first, int64_t width) {
  Vec a = {}, b = {}, c = {}, d = {};
  for (int64_t j = first; j < width; j += 4) {
    const Vec at = load(x + j);
    a += load(rows + j) * at, b += load(rows + width + j) * at;
    c += load(rows + 2 * width + j) * at, d += load(rows + 3 * width + j) * at;
  }
  return (Vec{a[0], b[0], c[0], d[0]} + Vec{a[1], b[1], c[1], d[1]}) +
         (Vec{a[2], b[2], c[2], d[2]} + Vec{a[3], b[3], c[3], d[3]});
}

// A x, with a multiple of four rows.
CT_INLINE void product(const double* A, const double* x, int64_t n, int64_t width, double* out) {
  for (int64_t i = 0; i < n; i += 4) store(out + i, four_dots(A + i * width, x, 0, width));
}

// H = P + sum_i s_i h_i h_i', s_i = w_i p_i (1 - p_i), from the diagonal's vector on; n is a multiple of four.
CT_INLINE void hessian(const double* P, const Space& space, int64_t n, double* H) {
  const int64_t width = space.width;
  std::copy(P, P + width * width, H);
  for (int64_t i = 0; i < n; i += 4) {
    const double* row[4];
    double s[4];
    for (int k = 0; k < 4; ++k) {
      row[k] = space.h.data() + (i + k) * width;
      s[k] = space.w[i + k] * space.p[i + k] * (1.0 - space.p[i + k]);
    }
    for (int64_t a = 0; a < width; ++a) {
      const double c[4] = {s[0] * row[0][a], s[1] * row[1][a], s[2] * row[2][a], s[3] * row[3][a]};
      for (int64_t b = a / 4 * 4; b < width; b += 4)
        store(H + a * width + b, load(H + a * width + b) + ((c[0] * load(row[0] + b) + c[1] * load(row[1] + b)) +
                                                            (c[2] * load(row[2] + b) + c[3] * load(row[3] + b))));
    }
  }
}

CT_INLINE void eliminate(const double* row, double c, double* from, int64_t first, int64_t width) {
  for (int64_t k = first; k < width; k += 4) store(from + k, load(from + k) - c * load(row + k));
}

// H x = b: H = U' D^-1 U in place, U the rows as elimination leaves them, D their diagonal, of which the reciprocals are
// kept; what stands left of the diagonal is cleared as far as its vector reaches. A pivot that rounding has eaten is
// replaced, so the direction stays one of descent. b becomes x.
CT_INLINE void solve(double* H, double* b, int64_t width) {
  double least[kWidest], inverse[kWidest];
  for (int64_t j = 0; j < width; ++j) least[j] = 1e-15 * H[j * width + j];
  for (int64_t block = 0; block < width; block += 4) {
    double* rows = H + block * width;
    for (int64_t j = block; j < block + 4; ++j) {  // four rows among themselves
      double* row = H + j * width;
      inverse[j] = 1.0 / std::max(row[j], least[j]);
      for (int64_t k = block; k <= j; ++k) row[k] = 0.0;
      for (int64_t a = j + 1; a < block + 4; ++a) eliminate(row, row[a] * inverse[j], H + a * width, block, width);
      eliminate(row, b[j] * inverse[j], b, block, width);
    }
    for (int64_t a = block + 4; a < width; ++a) {  // and from all others
      double c[4];
      for (int k = 0; k < 4; ++k) c[k] = rows[k * width + a] * inverse[block + k];
      double* target = H + a * width;
      for (int64_t k = a / 4 * 4; k < width; k += 4)
        store(target + k, load(target + k) - ((c[0] * load(rows + k) + c[1] * load(rows + width + k)) +
                                              (c[2] * load(rows + 2 * width + k) + c[3] * load(rows + 3 * width + k))));
    }
  }
  for (int64_t block = width - 4; block >= 0; block -= 4) {
    const double* rows = H + block * width;
    store(b + block, load(b + block) - four_dots(rows, b, block + 4, width));
    for (int64_t i = block + 3; i >= block; --i) {
      for (int64_t k = i + 1; k < block + 4; ++k) b[i] -= H[i * width + k] * b[k];
      b[i] *= inverse[i];
    }
  }
}

template <class T>
CT_INLINE int64_t widen(const Batch<T>& batch, int64_t task, Space& space) {
  const int64_t first = task * batch.rows, n = batch.lengths[task], padded = (n + 3) / 4 * 4;
  for (int64_t i = 0; i < n; ++i) {
    const T* row = batch.h + (first + i) * batch.d;
    for (int64_t j = 0; j < batch.d; ++j) space.h[i * space.width + j] = static_cast<double>(row[j]);
    space.base[i] = static_cast<double>(batch.base[first + i]);
    space.y[i] = static_cast<double>(batch.y[first + i]);
    space.w[i] = static_cast<double>(batch.w[first + i]);
  }
  std::fill(space.h.begin() + n * space.width, space.h.begin() + padded * space.width, 0.0);
  for (int64_t i = n; i < padded; ++i) space.base[i] = space.y[i] = space.w[i] = 0.0;
  return padded;
}

CT_INLINE void predict(Space& space, const double* e, int64_t n) {
  product(space.h.data(), e, n, space.width, space.z.data());
  for (int64_t i = 0; i < n; ++i) space.z[i] += space.base[i];
  for (int64_t i = 0; i < n; i += 4) store(&space.p[i], sigmoid(load(&space.z[i])));
}

// Objective at z + t along, off + t x, where off = e - mu.
CT_INLINE double objective(const Space& s, const double* P, const double* off, const double* x, double t, int64_t n) {
  double value = 0.0, at[kWidest], image[kWidest];
  for (int64_t i = 0; i < n; ++i) {
    const double z = s.z[i] + t * s.along[i];
    value += s.w[i] * (softplus(z) - s.y[i] * z);
  }
  for (int64_t j = 0; j < s.width; ++j) at[j] = off[j] + t * x[j];
  product(P, at, s.width, s.width, image);
  return value + 0.5 * dot(image, at, s.width);
}

// Slope of the objective there.
CT_INLINE double slope_at(const Space& s, const double* P, const double* off, const double* x, double t, int64_t n) {
  double at[kWidest], image[kWidest];
  Vec sum = {};
  for (int64_t i = 0; i < n; i += 4) {
    const Vec along = load(&s.along[i]), p = sigmoid(load(&s.z[i]) + t * along);
    sum += load(&s.w[i]) * (p - load(&s.y[i])) * along;
  }
  for (int64_t j = 0; j < s.width; ++j) at[j] = off[j] + t * x[j];
  product(P, at, s.width, s.width, image);
  return total(sum) + dot(image, x, s.width);
}

// Along a line the logistic loss has |F'''| <= r F'', r the largest change of a logit (generalized self-concordance), so
// F(t) - F(0) <= slope (t - (e^{rt} - 1 - rt) / r^2): up to r = 1 the whole step decreases the objective, beyond it
// t = log(1 + r) / r does. Larger ones are tried first, because they mostly do as well.
CT_INLINE double step_size(const Space& s, const double* P, const double* off, const double* x, double slope,
                           double reach, int64_t n) {
  if (reach <= kSmall) return 1.0;
  const double safe = std::log1p(reach) / reach;
  // a slope that is still negative is enough, since F is convex: F(t) <= F(0) + t F'(t)
  if (slope_at(s, P, off, x, 1.0, n) <= 1e-4 * slope) return 1.0;
  const double start = objective(s, P, off, x, 0.0, n);
  double t = 1.0;
  while (t > safe && !(objective(s, P, off, x, t, n) <= start + 1e-4 * t * slope)) t = std::max(t / 2, safe);
  return t;
}

template <class T>
CT_INLINE void forward_task(const Batch<T>& batch, const double* P, int64_t task, int steps, Space& space, T* e_out,
                            T* H_out) {
  const int64_t d = batch.d, width = space.width, n = widen(batch, task, space);
  double mu[kWidest] = {}, e[kWidest], off[kWidest], H[kWidest * kWidest], gradient[kWidest], x[kWidest];
  for (int64_t j = 0; j < d; ++j) mu[j] = static_cast<double>(batch.mu[task * d + j]);
  std::copy(mu, mu + width, e);
  bool done = n == 0;
  for (int step = 0;; ++step) {
    predict(space, e, n);
    hessian(P, space, n, H);
    if (done || step == steps) break;
    for (int64_t j = 0; j < width; ++j) off[j] = e[j] - mu[j];
    product(P, off, width, width, gradient);
    for (int64_t i = 0; i < n; ++i) {
      const double r = space.w[i] * (space.p[i] - space.y[i]);
      for (int64_t j = 0; j < width; j += 4) store(gradient + j, load(gradient + j) + r * load(&space.h[i * width + j]));
    }
    for (int64_t j = 0; j < width; ++j) x[j] = -gradient[j];
    solve(H, x, width);
    product(space.h.data(), x, n, width, space.along.data());
    double reach = 0.0;
    for (int64_t i = 0; i < n; ++i)
      if (space.w[i] > 0) reach = std::max(reach, std::fabs(space.along[i]));
    const double t = step_size(space, P, off, x, dot(gradient, x, width), reach, n);
    for (int64_t j = 0; j < width; ++j) e[j] += t * x[j];
    done = reach <= kConverged<T>;
  }
  for (int64_t j = 0; j < d; ++j) e_out[task * d + j] = static_cast<T>(e[j]);
  T* target = H_out + task * d * d;
  for (int64_t a = 0; a < d; ++a)
    for (int64_t b = a; b < d; ++b) target[a * d + b] = target[b * d + a] = static_cast<T>(H[a * width + b]);
}

template <class T>
struct Adjoint {
  const T *v, *e;
  T *h, *base, *y, *w, *mu;
  double* solved;
};

template <class T>
CT_INLINE void backward_task(const Batch<T>& batch, const double* P, int64_t task, Space& space,
                             const Adjoint<T>& out) {
  const int64_t d = batch.d, width = space.width, first = task * batch.rows, n = widen(batch, task, space);
  double e[kWidest] = {}, v[kWidest] = {}, H[kWidest * kWidest], image[kWidest];
  for (int64_t j = 0; j < d; ++j) e[j] = static_cast<double>(out.e[task * d + j]);
  for (int64_t j = 0; j < d; ++j) v[j] = static_cast<double>(out.v[task * d + j]);
  predict(space, e, n);
  hessian(P, space, n, H);
  solve(H, v, width);
  product(space.h.data(), v, n, width, space.along.data());
  for (int64_t i = 0; i < batch.rows; ++i) {
    T* row = out.h + (first + i) * d;
    if (i >= batch.lengths[task]) {  // padding
      std::fill(row, row + d, T(0));
      out.base[first + i] = out.y[first + i] = out.w[first + i] = T(0);
      continue;
    }
    const double p = space.p[i], hv = space.along[i], w = space.w[i], r = p - space.y[i];
    const double to_base = -w * p * (1.0 - p) * hv;
    for (int64_t j = 0; j < d; ++j) row[j] = static_cast<T>(-w * r * v[j] + to_base * e[j]);
    out.base[first + i] = static_cast<T>(to_base);
    out.y[first + i] = static_cast<T>(w * hv);
    out.w[first + i] = static_cast<T>(-r * hv);
  }
  product(P, v, width, width, image);
  for (int64_t j = 0; j < d; ++j) out.mu[task * d + j] = static_cast<T>(image[j]);
  std::copy(v, v + d, out.solved + task * d);
}

template <class T>
CT_INLINE void forward_tasks(const Batch<T>& batch, const double* P, int64_t first, int64_t last, int steps,
                             Space& space, T* e, T* H) {
  for (int64_t task = first; task < last; ++task) forward_task(batch, P, task, steps, space, e, H);
}
template <class T>
CT_INLINE void backward_tasks(const Batch<T>& batch, const double* P, int64_t first, int64_t last, Space& space,
                              const Adjoint<T>& out) {
  for (int64_t task = first; task < last; ++task) backward_task(batch, P, task, space, out);
}

#define CT_MAP_HEAD(T)                                                                                                 \
  CT_CLONES void forward_part(const Batch<T>& batch, const double* P, int64_t first, int64_t last, int steps,         \
                              Space& space, T* e, T* H) {                                                             \
    forward_tasks(batch, P, first, last, steps, space, e, H);                                                         \
  }                                                                                                                   \
  CT_CLONES void backward_part(const Batch<T>& batch, const double* P, int64_t first, int64_t last, Space& space,     \
                               const Adjoint<T>& out) {                                                               \
    backward_tasks(batch, P, first, last, space, out);                                                                \
  }
CT_MAP_HEAD(float)
CT_MAP_HEAD(double)

template <class T>
std::vector<double> wide_precision(const Batch<T>& batch, int64_t width) {
  std::vector<double> P(width * width, 0.0);
  for (int64_t a = 0; a < width; ++a) P[a * width + a] = 1.0;
  for (int64_t a = 0; a < batch.d; ++a)
    for (int64_t b = 0; b < batch.d; ++b) P[a * width + b] = static_cast<double>(batch.P[a * batch.d + b]);
  return P;
}

constexpr int64_t kChunk = 32;  // tasks handed to a thread at a time

template <class T, class Call>
void each_chunk(const Batch<T>& batch, int threads, const Call& call) {
  const int64_t width = (batch.d + 3) / 4 * 4;
  const std::vector<double> P = wide_precision(batch, width);
  int64_t longest = 0;
  for (int64_t t = 0; t < batch.tasks; ++t) longest = std::max(longest, batch.lengths[t]);
#pragma omp parallel num_threads(threads)
  {
    Space space((longest + 3) / 4 * 4, width);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < batch.tasks; first += kChunk)
      call(P.data(), first, std::min(first + kChunk, batch.tasks), space);
  }
}

template <class T>
void forward(const Batch<T>& batch, T* e, T* H, int steps, int threads) {
  each_chunk(batch, threads, [&](const double* P, int64_t first, int64_t last, Space& space) {
    forward_part(batch, P, first, last, steps, space, e, H);
  });
}

template <class T>
void backward(const Batch<T>& batch, const Adjoint<T>& out, int threads) {
  each_chunk(batch, threads, [&](const double* P, int64_t first, int64_t last, Space& space) {
    backward_part(batch, P, first, last, space, out);
  });
}

}  // namespace

#define CT_MAP_HEAD_EXPORT(name, T)                                                                                    \
  CT_EXPORT void ct_map_head_##name(const T* h, const T* base, const T* y, const T* w, const int64_t* lengths,        \
                                    const T* mu, const T* P, T* e, T* H, int64_t tasks, int64_t rows, int64_t d,      \
                                    int steps, int threads) {                                                         \
    forward<T>({h, base, y, w, lengths, mu, P, tasks, rows, d}, e, H, steps, threads);                                \
  }                                                                                                                   \
  CT_EXPORT void ct_map_head_backward_##name(                                                                         \
      const T* v, const T* e, const T* h, const T* base, const T* y, const T* w, const int64_t* lengths, const T* mu, \
      const T* P, T* to_h, T* to_base, T* to_y, T* to_w, T* to_mu, double* solved, int64_t tasks, int64_t rows,       \
      int64_t d, int threads) {                                                                                       \
    backward<T>({h, base, y, w, lengths, mu, P, tasks, rows, d},                                                      \
                {v, e, to_h, to_base, to_y, to_w, to_mu, solved}, threads);                                           \
  }
CT_MAP_HEAD_EXPORT(float32, float)
CT_MAP_HEAD_EXPORT(float64, double)

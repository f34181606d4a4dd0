// MAP vectors of many small logistic models and the adjoints of their optimality conditions (see core_tensor/map_head).
// A thread solves as many tasks at once as a vector has doubles, one in each lane, so that nothing is added up within a
// vector and no lane waits for another's division. Tasks are taken in the order of their lengths, and shorter ones are
// filled up with rows of weight zero, which change no sum. Sums run in float64.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "core.h"

namespace {

constexpr int kWidest = 32;
constexpr double kSmall = 1.0;       // up to this largest change of a logit the whole Newton step is safe
template <class T>
constexpr double kConverged = sizeof(T) == 4 ? 3e-5 : 1e-6;  // of a logit: the step after it changes some square of it

template <class T>
struct Batch {
  const T *h, *base, *y, *w;
  const int64_t* lengths;
  const T *mu, *P;
  int64_t tasks, rows, d;
  const double* wide;     // P in float64
  const int64_t* order;  // tasks by length
};

template <class T>
struct Adjoint {
  const T *v, *e;
  T *h, *base, *y, *w, *mu;
  double* solved;
};

template <int N>
struct Simd {
  typedef double Vec __attribute__((vector_size(8 * N)));
  typedef int64_t Bits __attribute__((vector_size(8 * N)));  // of a comparison, too: -1 where it holds
  typedef uint64_t Words __attribute__((vector_size(8 * N)));
};

// Buffers of one thread: [row][column][lane], [row][lane], [column][column][lane] and [column][lane]; whole cache lines,
// because a vector that lies in two of them is loaded twice.
template <int N>
struct Space {
  std::vector<double> all;
  double *h, *base, *y, *w, *z, *along, *p, *H, *mu, *e, *off, *gradient, *x, *spare;
  Space(int64_t rows, int64_t d) : all((rows * (d + 6) + d * d + 6 * d) * N + 8) {
    double* next = all.data() + (64 - reinterpret_cast<uintptr_t>(all.data()) % 64) % 64 / 8;
    const auto take = [&](int64_t count) {
      next += count * N;
      return next - count * N;
    };
    h = take(rows * d);
    for (double** each : {&base, &y, &w, &z, &along, &p}) *each = take(rows);
    H = take(d * d);
    for (double** each : {&mu, &e, &off, &gradient, &x, &spare}) *each = take(d);
  }
};

template <int N>
struct Solver {
  typedef typename Simd<N>::Vec Vec;
  typedef typename Simd<N>::Bits Bits;
  typedef typename Simd<N>::Words Words;
  Space<N>& s;
  const double* P;
  int64_t d, n;

  static CT_INLINE Vec& at(double* from, int64_t i) { return *reinterpret_cast<Vec*>(from + i * N); }
  CT_INLINE Vec& H(int64_t a, int64_t b) const { return at(s.H, a * d + b); }
  CT_INLINE Vec& h(int64_t i, int64_t j) const { return at(s.h, i * d + j); }

  // exp(x) for x <= 0, to an ulp or so: 2^n times the Taylor polynomial of the rest, which is at most log(2) / 2.
  static CT_INLINE Vec exp_negative(Vec x) {
    constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: what is added to it is rounded to an integer
    constexpr double kTaylor[] = {1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0,
                                  1 / 40320.0,      1 / 5040.0,      1 / 720.0,      1 / 120.0,     1 / 24.0,
                                  1 / 6.0,          1 / 2.0,         1.0,            1.0};
    x = x > -708.0 ? x : Vec{} - 708.0;  // below it the result would be denormal
    const Vec shifted = x * 1.4426950408889634 + kShift, k = shifted - kShift;
    const Vec r = (x - k * 0x1.62e42fefa38p-1) - k * 0x1.ef35793c7673p-45;
    Vec value = Vec{} + kTaylor[0];
    for (int i = 1; i < 14; ++i) value = value * r + kTaylor[i];
    return value * (Vec)(((Words)shifted << 52) + (Words)(Vec{} + 1.0));
  }
  static CT_INLINE Vec sigmoid(Vec z) {
    const Vec q = exp_negative(z < 0.0 ? z : -z);
    return (z < 0.0 ? q : Vec{} + 1.0) / (1.0 + q);
  }

  // log(1 + e^z); log(1 + q) = 2 atanh(q / (2 + q)), a series in at most 1 / 3.
  static CT_INLINE Vec softplus(Vec z) {
    const Vec q = exp_negative(z < 0.0 ? z : -z), u = q / (2.0 + q), square = u * u;
    Vec sum = Vec{} + 1.0 / 35.0;
    for (int k = 33; k > 0; k -= 2) sum = sum * square + 1.0 / k;
    return 2.0 * u * sum + (z > 0.0 ? z : Vec{});
  }
  static CT_INLINE bool any(Bits mask) {
    int64_t found = 0;
    for (int l = 0; l < N; ++l) found |= mask[l];
    return found != 0;
  }

  // Rows of up to N tasks, in lanes; n becomes the length of the longest in whole groups of four.
  template <class T>
  CT_INLINE void widen(const Batch<T>& batch, const int64_t* tasks, int64_t count) {
    n = 0;
    for (int64_t l = 0; l < count; ++l) n = std::max(n, batch.lengths[tasks[l]]);
    n = (n + 3) / 4 * 4;
    for (int64_t l = 0; l < N; ++l) {
      const int64_t own = l < count ? batch.lengths[tasks[l]] : 0, first = l < count ? tasks[l] * batch.rows : 0;
      fill(batch.h + first * d, own * d, n * d, s.h + l);
      fill(batch.base + first, own, n, s.base + l);
      fill(batch.y + first, own, n, s.y + l);
      fill(batch.w + first, own, n, s.w + l);
    }
  }
  // One lane: `own` values, zeros up to `all`.
  template <class T>
  static CT_INLINE void fill(const T* from, int64_t own, int64_t all, double* lane) {
    for (int64_t k = 0; k < own; ++k) lane[k * N] = static_cast<double>(from[k]);
    for (int64_t k = own; k < all; ++k) lane[k * N] = 0.0;
  }

  // Values of up to N tasks, d each, in lanes; lanes without a task hold zeros.
  template <class T>
  CT_INLINE void spread(const T* from, const int64_t* tasks, int64_t count, double* to) const {
    for (int64_t l = 0; l < N; ++l)
      for (int64_t j = 0; j < d; ++j) to[j * N + l] = l < count ? static_cast<double>(from[tasks[l] * d + j]) : 0.0;
  }

  // h_i' x of every row.
  CT_INLINE void product(double* x, double* out) const {
    for (int64_t i = 0; i < n; i += 4) {
      Vec a = {}, b = {}, c = {}, e = {};
      for (int64_t j = 0; j < d; ++j) {
        const Vec v = at(x, j);
        a += h(i, j) * v, b += h(i + 1, j) * v, c += h(i + 2, j) * v, e += h(i + 3, j) * v;
      }
      at(out, i) = a, at(out, i + 1) = b, at(out, i + 2) = c, at(out, i + 3) = e;
    }
  }
  // P x.
  CT_INLINE void image(double* x, double* out) const {
    for (int64_t a = 0; a < d; ++a) {
      Vec sum = {};
      for (int64_t b = 0; b < d; ++b) sum += P[a * d + b] * at(x, b);
      at(out, a) = sum;
    }
  }
  CT_INLINE Vec dot(double* a, double* b) const {
    Vec sum = {};
    for (int64_t j = 0; j < d; ++j) sum += at(a, j) * at(b, j);
    return sum;
  }

  CT_INLINE void predict() const {
    product(s.e, s.z);
    for (int64_t i = 0; i < n; ++i) {
      at(s.z, i) += at(s.base, i);
      at(s.p, i) = sigmoid(at(s.z, i));
    }
  }

  // H = P + sum_i w_i p_i (1 - p_i) h_i h_i', from the diagonal on.
  CT_INLINE void hessian() const {
    for (int64_t a = 0; a < d; ++a)
      for (int64_t b = a; b < d; ++b) H(a, b) = Vec{} + P[a * d + b];
    for (int64_t i = 0; i < n; i += 4) {
      Vec weight[4];
      for (int k = 0; k < 4; ++k) weight[k] = at(s.w, i + k) * at(s.p, i + k) * (1.0 - at(s.p, i + k));
      for (int64_t a = 0; a < d; ++a) {
        const Vec c0 = weight[0] * h(i, a), c1 = weight[1] * h(i + 1, a);
        const Vec c2 = weight[2] * h(i + 2, a), c3 = weight[3] * h(i + 3, a);
        for (int64_t b = a; b < d; ++b)
          H(a, b) += (c0 * h(i, b) + c1 * h(i + 1, b)) + (c2 * h(i + 2, b) + c3 * h(i + 3, b));
      }
    }
  }

  // H x = b: H = U' D^-1 U in place, U the rows as elimination leaves them, D their diagonal. A pivot that rounding has
  // eaten is replaced, so the direction stays one of descent. b becomes x.
  CT_INLINE void solve(double* b) const {
    Vec least[kWidest], inverse[kWidest];
    for (int64_t j = 0; j < d; ++j) least[j] = 1e-15 * H(j, j);
    for (int64_t j = 0; j < d; ++j) {
      const Vec pivot = H(j, j);
      inverse[j] = 1.0 / (pivot > least[j] ? pivot : least[j]);
      for (int64_t a = j + 1; a < d; ++a) {
        const Vec c = H(j, a) * inverse[j];
        for (int64_t k = a; k < d; ++k) H(a, k) -= c * H(j, k);
        at(b, a) -= c * at(b, j);
      }
    }
    for (int64_t j = d - 1; j >= 0; --j) {
      Vec value = at(b, j);
      for (int64_t k = j + 1; k < d; ++k) value -= H(j, k) * at(b, k);
      at(b, j) = value * inverse[j];
    }
  }

  // Loss part of the objective at z + t along.
  CT_INLINE Vec loss(Vec t) const {
    Vec value = {};
    for (int64_t i = 0; i < n; ++i) {
      const Vec z = at(s.z, i) + t * at(s.along, i);
      value += at(s.w, i) * (softplus(z) - at(s.y, i) * z);
    }
    return value;
  }
  // Its slope at z + along.
  CT_INLINE Vec loss_slope() const {
    Vec sum = {};
    for (int64_t i = 0; i < n; ++i)
      sum += at(s.w, i) * (sigmoid(at(s.z, i) + at(s.along, i)) - at(s.y, i)) * at(s.along, i);
    return sum;
  }

  // Along a line the logistic loss has |F'''| <= r F'', r the largest change of a logit (generalized self-concordance),
  // so F(t) - F(0) <= slope (t - (e^{rt} - 1 - rt) / r^2): up to r = 1 the whole step decreases the objective, beyond it
  // t = log(1 + r) / r does. Larger ones are tried first, because they mostly do as well.
  CT_INLINE Vec step_sizes(Vec slope, Vec reach, Bits active) const {
    Vec t = Vec{} + 1.0;
    if (!any(active & (reach > kSmall))) return t;
    // of the prior's part, (off + t x)' P (off + t x) / 2 = constant + t by + t^2 bent / 2
    image(s.x, s.spare);
    const Vec by = dot(s.spare, s.off), bent = dot(s.spare, s.x), enough = 1e-4 * slope;
    // a slope that is still negative is enough, since F is convex: F(t) <= F(0) + t F'(t)
    Bits bad = active & (reach > kSmall) & (loss_slope() + by + bent > enough);
    if (!any(bad)) return t;
    Vec safe = t;
    for (int l = 0; l < N; ++l)
      if (bad[l]) safe[l] = std::log1p(reach[l]) / reach[l];
    const Vec start = loss(Vec{});
    while (any(bad &= (t > safe) & ~(loss(t) - start + t * (by + 0.5 * t * bent) <= t * enough))) {
      const Vec half = 0.5 * t > safe ? 0.5 * t : safe;
      t = bad ? half : t;
    }
    return t;
  }
};

template <int N, class T>
CT_INLINE void forward_group(const Batch<T>& batch, const int64_t* tasks, int64_t count, int steps, Space<N>& s,
                             T* e_out, T* H_out) {
  typedef Solver<N> S;
  typedef typename S::Vec Vec;
  typedef typename S::Bits Bits;
  const int64_t d = batch.d;
  S solver{s, batch.wide, d, 0};
  solver.widen(batch, tasks, count);
  solver.spread(batch.mu, tasks, count, s.mu);
  std::copy(s.mu, s.mu + d * N, s.e);
  Bits active = {};
  for (int64_t l = 0; l < count; ++l) active[l] = batch.lengths[tasks[l]] > 0 ? -1 : 0;
  for (int step = 0;; ++step) {
    solver.predict();
    solver.hessian();
    if (!S::any(active) || step == steps) break;
    for (int64_t j = 0; j < d; ++j) S::at(s.off, j) = S::at(s.e, j) - S::at(s.mu, j);
    solver.image(s.off, s.gradient);
    for (int64_t i = 0; i < solver.n; ++i) {
      const Vec r = S::at(s.w, i) * (S::at(s.p, i) - S::at(s.y, i));
      for (int64_t j = 0; j < d; ++j) S::at(s.gradient, j) += r * solver.h(i, j);
    }
    for (int64_t j = 0; j < d; ++j) S::at(s.x, j) = -S::at(s.gradient, j);
    solver.solve(s.x);
    solver.product(s.x, s.along);
    Vec reach = {};
    for (int64_t i = 0; i < solver.n; ++i) {
      const Vec moved = S::at(s.along, i), size = moved < 0.0 ? -moved : moved;
      reach = (S::at(s.w, i) > 0.0) & (size > reach) ? size : reach;
    }
    const Vec t = solver.step_sizes(solver.dot(s.gradient, s.x), reach, active);
    for (int64_t j = 0; j < d; ++j) S::at(s.e, j) = active ? S::at(s.e, j) + t * S::at(s.x, j) : S::at(s.e, j);
    active &= reach > kConverged<T>;
  }
  for (int64_t l = 0; l < count; ++l) {
    for (int64_t j = 0; j < d; ++j) e_out[tasks[l] * d + j] = static_cast<T>(s.e[j * N + l]);
    T* target = H_out + tasks[l] * d * d;
    for (int64_t a = 0; a < d; ++a)
      for (int64_t b = a; b < d; ++b)
        target[a * d + b] = target[b * d + a] = static_cast<T>(s.H[(a * d + b) * N + l]);
  }
}

template <int N, class T>
CT_INLINE void backward_group(const Batch<T>& batch, const int64_t* tasks, int64_t count, Space<N>& s,
                              const Adjoint<T>& out) {
  const int64_t d = batch.d;
  Solver<N> solver{s, batch.wide, d, 0};
  solver.widen(batch, tasks, count);
  solver.spread(out.e, tasks, count, s.e);
  solver.spread(out.v, tasks, count, s.x);
  solver.predict();
  solver.hessian();
  solver.solve(s.x);
  solver.product(s.x, s.along);
  solver.image(s.x, s.off);
  for (int64_t l = 0; l < count; ++l) {
    const int64_t first = tasks[l] * batch.rows, own = batch.lengths[tasks[l]];
    for (int64_t i = 0; i < own; ++i) {
      T* row = out.h + (first + i) * d;
      const double p = s.p[i * N + l], hv = s.along[i * N + l], w = s.w[i * N + l], r = p - s.y[i * N + l];
      const double to_base = -w * p * (1.0 - p) * hv;
      for (int64_t j = 0; j < d; ++j) row[j] = static_cast<T>(-w * r * s.x[j * N + l] + to_base * s.e[j * N + l]);
      out.base[first + i] = static_cast<T>(to_base);
      out.y[first + i] = static_cast<T>(w * hv);
      out.w[first + i] = static_cast<T>(-r * hv);
    }
    std::fill(out.h + (first + own) * d, out.h + (first + batch.rows) * d, T(0));  // padding
    for (T* padding : {out.base, out.y, out.w}) std::fill(padding + first + own, padding + first + batch.rows, T(0));
    for (int64_t j = 0; j < d; ++j) {
      out.mu[tasks[l] * d + j] = static_cast<T>(s.off[j * N + l]);
      out.solved[tasks[l] * d + j] = s.x[j * N + l];
    }
  }
}

#define CT_MAP_HEAD(T, N, LEVEL)                                                                                       \
  LEVEL void forward_##T##_##N(const Batch<T>& batch, const int64_t* tasks, int64_t count, int steps, Space<N>& s,    \
                               T* e, T* H) {                                                                          \
    forward_group<N, T>(batch, tasks, count, steps, s, e, H);                                                         \
  }                                                                                                                   \
  LEVEL void backward_##T##_##N(const Batch<T>& batch, const int64_t* tasks, int64_t count, Space<N>& s,              \
                                const Adjoint<T>& out) {                                                              \
    backward_group<N, T>(batch, tasks, count, s, out);                                                                \
  }
CT_MAP_HEAD(float, 8, CT_V4)
CT_MAP_HEAD(double, 8, CT_V4)
CT_MAP_HEAD(float, 4, CT_V3)
CT_MAP_HEAD(double, 4, CT_V3)
CT_MAP_HEAD(float, 2, )
CT_MAP_HEAD(double, 2, )

// Calls of `call(tasks, count, buffers)` for groups of N tasks of similar lengths.
template <int N, class T, class Call>
void each_group(const Batch<T>& batch, int threads, const Call& call) {
  const int64_t longest = batch.tasks ? batch.lengths[batch.order[batch.tasks - 1]] : 0;
#pragma omp parallel num_threads(threads)
  {
    Space<N> space((longest + 3) / 4 * 4, batch.d);
#pragma omp for schedule(dynamic, 4)
    for (int64_t first = 0; first < batch.tasks; first += N)
      call(batch.order + first, std::min<int64_t>(N, batch.tasks - first), space);
  }
}

template <class T, class Call8, class Call4, class Call2>
void run(Batch<T> batch, int threads, const Call8& v4, const Call4& v3, const Call2& v2) {
  const std::vector<double> wide(batch.P, batch.P + batch.d * batch.d);
  std::vector<int64_t> order(batch.tasks);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return batch.lengths[a] < batch.lengths[b]; });
  batch.wide = wide.data(), batch.order = order.data();
  const int level = ct_level();
  if (level == 4)
    each_group<8>(batch, threads, [&](const int64_t* t, int64_t n, Space<8>& s) { v4(batch, t, n, s); });
  else if (level == 3)
    each_group<4>(batch, threads, [&](const int64_t* t, int64_t n, Space<4>& s) { v3(batch, t, n, s); });
  else
    each_group<2>(batch, threads, [&](const int64_t* t, int64_t n, Space<2>& s) { v2(batch, t, n, s); });
}

}  // namespace

#define CT_MAP_HEAD_CALL(T, direction, N, ...)                                                                         \
  [&](const Batch<T>& batch, const int64_t* tasks, int64_t count, Space<N>& space) {                                  \
    direction##_##T##_##N(batch, tasks, count, __VA_ARGS__);                                                          \
  }
#define CT_MAP_HEAD_EXPORT(name, T)                                                                                    \
  CT_EXPORT void ct_map_head_##name(const T* h, const T* base, const T* y, const T* w, const int64_t* lengths,        \
                                    const T* mu, const T* P, T* e, T* H, int64_t tasks, int64_t rows, int64_t d,      \
                                    int steps, int threads) {                                                         \
    run<T>({h, base, y, w, lengths, mu, P, tasks, rows, d, nullptr, nullptr}, threads,                                \
           CT_MAP_HEAD_CALL(T, forward, 8, steps, space, e, H), CT_MAP_HEAD_CALL(T, forward, 4, steps, space, e, H),  \
           CT_MAP_HEAD_CALL(T, forward, 2, steps, space, e, H));                                                      \
  }                                                                                                                   \
  CT_EXPORT void ct_map_head_backward_##name(                                                                         \
      const T* v, const T* e, const T* h, const T* base, const T* y, const T* w, const int64_t* lengths, const T* mu, \
      const T* P, T* to_h, T* to_base, T* to_y, T* to_w, T* to_mu, double* solved, int64_t tasks, int64_t rows,       \
      int64_t d, int threads) {                                                                                       \
    const Adjoint<T> out{v, e, to_h, to_base, to_y, to_w, to_mu, solved};                                             \
    run<T>({h, base, y, w, lengths, mu, P, tasks, rows, d, nullptr, nullptr}, threads,                                \
           CT_MAP_HEAD_CALL(T, backward, 8, space, out), CT_MAP_HEAD_CALL(T, backward, 4, space, out),                \
           CT_MAP_HEAD_CALL(T, backward, 2, space, out));                                                             \
  }
CT_MAP_HEAD_EXPORT(float32, float)
CT_MAP_HEAD_EXPORT(float64, double)

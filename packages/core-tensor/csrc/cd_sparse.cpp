// Active-set coordinate descent on one row after another (see core_tensor/cd_sparse): a sweep only scans for codes that
// want to change, and pays for a gradient update of length p where one does.
#include <vector>

#include "triangular.h"

namespace {

template <typename T>
struct Problem {
  uint8_t* codes;         // (rows, p), updated in place
  T* gradient;            // (rows, p), updated in place
  const T* sigma;         // (p, p)
  const T* inverse;       // (p): 1 / Sigma_jj, 0 for a dead feature
  const T* scale;         // (rows, groups)
  const int64_t* group;   // (p)
  const uint8_t* frozen;  // (rows, p) or null
  int64_t* moves;         // (rows)
  uint8_t* converged;     // (rows)
  int64_t rows, p, groups;
  T max_code;
  int64_t max_sweeps;
};

// The code that minimizes the objective in coordinate j, or the present one where that is no worse (ties stay).
template <typename T>
CT_INLINE T wanted(T code, T step, T max_code) {
  const T target = code + step;
  if (!(step > T(0.5) || step < T(-0.5))) return code;
  const T bounded = target < T(0) ? T(0) : (target > max_code ? max_code : target);
  const T shifted = bounded + kShift<T>;
  return shifted - kShift<T>;
}

constexpr int64_t kScan = 32;

template <typename T>
CT_INLINE bool any_wants(const T* g, const T* h, int64_t count) {
  int any = 0;
  if (count == kScan) {
    for (int64_t j = 0; j < kScan; ++j) any |= (g[j] * h[j] > T(0.5)) | (g[j] * h[j] < T(-0.5));
  } else {
    for (int64_t j = 0; j < count; ++j) any |= (g[j] * h[j] > T(0.5)) | (g[j] * h[j] < T(-0.5));
  }
  return any != 0;
}

template <typename T>
CT_INLINE void row(const Problem<T>& q, int64_t i, T* h) {
  uint8_t* codes = q.codes + i * q.p;
  T* g = q.gradient + i * q.p;
  const T* scale = q.scale + i * q.groups;
  for (int64_t j = 0; j < q.p; ++j)  // frozen coordinates never want to move
    h[j] = q.frozen && q.frozen[i * q.p + j] ? T(0) : q.inverse[j] / scale[q.group[j]];
  int64_t moves = 0;
  bool settled = false;
  for (int64_t sweep = 0; sweep < q.max_sweeps && !settled; ++sweep) {
    settled = true;
    for (int64_t j0 = 0; j0 < q.p; j0 += kScan) {
      const int64_t end = j0 + kScan < q.p ? j0 + kScan : q.p;
      if (!any_wants(g + j0, h + j0, end - j0)) continue;
      for (int64_t j = j0; j < end; ++j) {
        const T old = codes[j];
        const T code = wanted<T>(old, g[j] * h[j], q.max_code);
        if (code == old) continue;
        const T change = (code - old) * scale[q.group[j]];
        const T* sigma = q.sigma + j * q.p;
        for (int64_t k = 0; k < q.p; ++k) g[k] -= change * sigma[k];
        codes[j] = static_cast<uint8_t>(code);
        ++moves;
        settled = false;
      }
    }
  }
  q.moves[i] = moves;
  q.converged[i] = settled;
}

CT_CLONES void row_float(const Problem<float>& q, int64_t i, float* h) { row(q, i, h); }
CT_CLONES void row_double(const Problem<double>& q, int64_t i, double* h) { row(q, i, h); }

template <typename T, typename Row>
void run(const Problem<T>& q, int threads, Row each) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> h(static_cast<size_t>(q.p));
#pragma omp for schedule(dynamic, 8)
    for (int64_t i = 0; i < q.rows; ++i) each(q, i, h.data());
  }
}

}  // namespace

#define CT_CD_SPARSE(NAME, T, ROW)                                                                                     \
  CT_EXPORT int NAME(uint8_t* codes, T* gradient, const T* sigma, const T* inverse, const T* scale,                    \
                     const int64_t* group, const uint8_t* frozen, int64_t* moves, uint8_t* converged, int64_t rows,    \
                     int64_t p, int64_t groups, int max_code, int64_t max_sweeps, int threads) {                       \
    if (!are_indices(group, p, groups)) return 0;                                                                      \
    run<T>({codes, gradient, sigma, inverse, scale, group, frozen, moves, converged, rows, p, groups,                  \
            static_cast<T>(max_code), max_sweeps},                                                                     \
           threads, ROW);                                                                                              \
    return 1;                                                                                                          \
  }

CT_CD_SPARSE(ct_cd_sparse_float32, float, row_float)
CT_CD_SPARSE(ct_cd_sparse_float64, double, row_double)

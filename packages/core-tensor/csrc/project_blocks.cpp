// Euclidean projection of every block of a ragged vector onto its capped box.
#include <vector>

#include "blocks.h"
#include "core.h"

namespace {

using core_tensor::Block;
using core_tensor::Family;
using core_tensor::Support;

CT_CLONES void project_one(const Family<double>& family, const double* v, double* x, int64_t first, int64_t n,
                           double cap, std::vector<double>& r, Support& out) {
  for (int64_t k = 0; k < n; ++k) r[k] = -v[first + k];
  double least = 0.0;
  if (family.is_simplex()) {
    core_tensor::project_simplex<double>(r.data(), n, 1.0, cap, family.equality, out, least);
  } else {
    core_tensor::project_capped(Block<double>{family, first, cap}, r.data(), n, 1.0, out);
  }
  for (int64_t k = 0; k < n; ++k) x[first + k] = 0.0;
  for (int64_t i = 0; i < out.count; ++i) x[first + out.at[i]] = out.x[i];
}

}  // namespace

// Returns 1, or 0 for offsets that do not rise from 0 to `variables`, or a block too long for 32-bit positions.
CT_EXPORT int ct_project_blocks(const double* v, const int64_t* offsets, const double* cap, const double* upper,
                                const double* weight, double* x, int64_t variables, int64_t blocks, int64_t cap_stride,
                                int64_t upper_stride, int equality, int threads) {
  if (!are_offsets(offsets, blocks, variables)) return 0;
  const Family<double> family{cap, cap_stride, upper, upper_stride, weight, equality != 0};
  int64_t longest = 1;
  for (int64_t b = 0; b < blocks; ++b) longest = std::max(longest, offsets[b + 1] - offsets[b]);
  if (longest > INT32_MAX) return 0;
#pragma omp parallel num_threads(threads)
  {
    std::vector<double> r(longest), values(longest + 1);
    std::vector<int32_t> at(longest + 1);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      Support out{at.data(), values.data(), 0};
      project_one(family, v, x, offsets[b], offsets[b + 1] - offsets[b], cap[b * cap_stride], r, out);
    }
  }
  return 1;
}

// What an optimizer reads off the sums of a dual pass, in one loop over the rows (see core_tensor/dual_bounds).
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core.h"

namespace {

enum Found { kTotals = 5, kPriced = kTotals, kBudget, kViolation, kRepaired };  // the totals of the pass stand first

}  // namespace

// Returns 1, or 0 if a scale is not positive.
CT_EXPORT int ct_dual_bounds(const int64_t* sums, const double* scale, const double* lam, const double* budgets,
                             const uint8_t* free, double keep, double* gradient, double* shrink, double* found,
                             int64_t rows, int) {
  double priced[4] = {}, budget[4] = {}, repaired[4] = {}, violation = 0.0;  // four sums each, which overlap
  int refused = 0;
  for (int64_t j = 0; j < rows; ++j) {
    refused |= !(scale[2 * j] > 0.0) | !(scale[2 * j + 1] > 0.0);
    const double load = static_cast<double>(sums[2 * j]) / scale[2 * j], b = budgets[j], g = load - b;
    const double spent = static_cast<double>(sums[2 * j + 1]) / scale[2 * j + 1], limit = keep * b;
    gradient[j] = g;
    shrink[j] = load > limit ? limit / load : 1.0;
    violation = std::max(violation, (free && free[j] ? std::abs(g) : g) / (1.0 + std::abs(b)));
    priced[j % 4] += lam[j] * g;
    budget[j % 4] += lam[j] * b;
    repaired[j % 4] += spent * shrink[j];
  }
  for (int i = 0; i < kTotals; ++i) {
    refused |= !(scale[2 * rows + i] > 0.0);
    found[i] = static_cast<double>(sums[2 * rows + i]) / scale[2 * rows + i];
  }
  found[kPriced] = (priced[0] + priced[1]) + (priced[2] + priced[3]);
  found[kBudget] = (budget[0] + budget[1]) + (budget[2] + budget[3]);
  found[kViolation] = violation;
  found[kRepaired] = (repaired[0] + repaired[1]) + (repaired[2] + repaired[3]);
  return !refused;
}

// Projection of one block onto the capped box {0 <= x <= u, w'x <= d} (or w'x = d), from reduced costs r:
//   x = argmin r'x + gamma/2 ||x||^2 = clip((-r - theta w) / gamma, 0, u), theta the multiplier of the cut.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

namespace core_tensor {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Parameters of a family of blocks; null pointers and strides of 0 stand for a value shared by all.
template <class T>
struct Family {
  const double* cap;      // d, one per block (stride 1) or shared (stride 0); infinite for a plain box
  int64_t cap_stride;
  const T* upper;         // u, one per variable or shared; null for no upper bound of its own
  int64_t upper_stride;
  const T* weight;        // w > 0, one per variable; null for ones
  bool equality;
  bool is_simplex() const { return upper == nullptr && weight == nullptr; }
};

// Entries of one block after projection: positions (inside the block) and values of the nonzeros.
struct Support {
  int32_t* at;
  double* x;
  int64_t count;
};

// Simplex: only entries below min(r_min + gamma z, 0) can be positive, so almost always one or two are looked at.
inline void finish_simplex(const double* r, double r_min, double gamma, double z, bool equality, Support& out) {
  if (out.count == 1) {
    out.x[0] = equality ? z : std::min(z, -r_min / gamma);
    return;
  }
  // Differences from r_min keep full accuracy when r is much larger than gamma.
  if (out.count == 2) {  // most that is left: without loops, whose ends cannot be foreseen
    const double a = r[out.at[0]], b = r[out.at[1]], sum = (a - r_min) + (b - r_min), tau = (gamma * z + sum) / 2.0;
    const bool slack = !equality && -(sum + 2.0 * r_min) <= gamma * z;
    if (slack || sum < tau) {
      out.x[0] = (slack ? -a : tau - (a - r_min)) / gamma;
      out.x[1] = (slack ? -b : tau - (b - r_min)) / gamma;
      return;
    }
  }
  double sum = 0.0;
  for (int64_t k = 0; k < out.count; ++k) sum += r[out.at[k]] - r_min;
  if (!equality && -(sum + static_cast<double>(out.count) * r_min) <= gamma * z) {
    for (int64_t k = 0; k < out.count; ++k) out.x[k] = -r[out.at[k]] / gamma;
    return;
  }
  int64_t count = out.count;
  double tau = 0.0;
  for (bool dropped = true; dropped;) {  // Michelot: every pass drops entries for good, so it ends
    tau = (gamma * z + sum) / static_cast<double>(count);
    dropped = false;
    int64_t kept = 0;
    double rest = 0.0;
    for (int64_t k = 0; k < count; ++k) {
      const double s = r[out.at[k]] - r_min;
      if (s < tau || s == 0.0) {
        out.at[kept++] = out.at[k];
        rest += s;
      } else {
        dropped = true;
      }
    }
    count = kept;
    sum = rest;
  }
  for (int64_t k = 0; k < count; ++k) out.x[k] = std::max(tau - (r[out.at[k]] - r_min), 0.0) / gamma;
  out.count = count;
}

template <class T>
inline void project_simplex(const double* r, int64_t n, double gamma, double z, bool equality, Support& out,
                            double& least) {
  double r_min = kInfinity;
  for (int64_t k = 0; k < n; ++k) r_min = r[k] < r_min ? r[k] : r_min;
  least = equality ? z * r_min : z * std::min(r_min, 0.0);
  const double bound = equality ? r_min + gamma * z : std::min(r_min + gamma * z, 0.0);
  int64_t count = 0;
  for (int64_t k = 0; k < n; ++k) {
    out.at[count] = static_cast<int32_t>(k);
    count += r[k] < bound;
  }
  if (count == 0 && (equality || r_min < 0.0) && n > 0 && z > 0) {  // gamma z is below the spacing of floats at r_min
    for (int64_t k = 0; k < n && count == 0; ++k)
      if (r[k] == r_min) out.at[count++] = static_cast<int32_t>(k);
  }
  out.count = count;
  if (count > 0) finish_simplex(r, r_min, gamma, z, equality, out);
}

// One block of a Family with its own bounds resolved: u_k = min(upper_k, cap / w_k) is always finite.
template <class T>
struct Block {
  const Family<T>& family;
  int64_t first;  // position of the block's first variable in upper and weight
  double cap;
  double w(int64_t k) const { return family.weight ? static_cast<double>(family.weight[first + k]) : 1.0; }
  double u(int64_t k) const {
    const double own = family.upper ? static_cast<double>(family.upper[(first + k) * family.upper_stride]) : kInfinity;
    return std::min(own, cap / w(k));
  }
};

template <class T>
inline double clipped(const Block<T>& block, const double* r, int64_t k, double gamma, double theta) {
  return std::min(std::max((-r[k] - theta * block.w(k)) / gamma, 0.0), block.u(k));
}

// Root of f(theta) = w'x(theta) - d, piecewise linear and falling: Newton inside a bracket, bisection outside.
template <class T>
inline double cut_multiplier(const Block<T>& block, const double* r, int64_t n, double gamma) {
  double low = kInfinity, high = -kInfinity;  // at low every x is u, at high every x is 0
  for (int64_t k = 0; k < n; ++k) {
    const double w = block.w(k);
    low = std::min(low, (-r[k] - gamma * block.u(k)) / w);
    high = std::max(high, -r[k] / w);
  }
  if (!block.family.equality) low = std::max(low, 0.0);
  double theta = low;
  for (int iteration = 0; iteration < 200; ++iteration) {
    double total = 0.0, slope = 0.0;
    for (int64_t k = 0; k < n; ++k) {
      const double w = block.w(k), u = block.u(k), free = (-r[k] - theta * w) / gamma;
      if (free >= u) {
        total += w * u;
      } else if (free > 0.0) {
        total += w * free;
        slope += w * w;
      }
    }
    const double excess = total - block.cap;
    (excess > 0.0 ? low : high) = theta;
    if (excess == 0.0) break;
    double next = slope > 0.0 ? theta + excess * gamma / slope : kInfinity;
    if (std::abs(next - theta) <= 1e-16 * std::abs(theta)) break;
    if (!(next > low && next < high)) next = 0.5 * (low + high);  // also when Newton jumps between the two ends
    if (next == theta) break;
    theta = next;
  }
  return theta;
}

// Least value of r'v over the block: a fractional knapsack, filled by falling -r/w.
template <class T>
inline double least_value(const Block<T>& block, const double* r, int64_t n, std::pair<double, int32_t>* order) {
  double used = 0.0, value = 0.0;
  int64_t count = 0;
  for (int64_t k = 0; k < n; ++k) {
    if (r[k] >= 0.0 && !block.family.equality) continue;
    order[count++] = {r[k] / block.w(k), static_cast<int32_t>(k)};
    used += block.w(k) * block.u(k);
    value += block.u(k) * r[k];
  }
  if (used <= block.cap) return value;
  std::sort(order, order + count);
  double left = block.cap;
  value = 0.0;
  for (int64_t i = 0; i < count && left > 0.0; ++i) {
    const int64_t k = order[i].second;
    const double take = std::min(left, block.w(k) * block.u(k));
    value += order[i].first * take;
    left -= take;
  }
  return value;
}

template <class T>
inline void project_capped(const Block<T>& block, const double* r, int64_t n, double gamma, Support& out) {
  double total = 0.0;
  for (int64_t k = 0; k < n; ++k) total += block.w(k) * clipped(block, r, k, gamma, 0.0);
  const bool cut = block.family.equality ? total != block.cap : total > block.cap;
  const double theta = cut && n > 0 ? cut_multiplier(block, r, n, gamma) : 0.0;
  int64_t count = 0;
  for (int64_t k = 0; k < n; ++k) {
    out.at[count] = static_cast<int32_t>(k);
    out.x[count] = clipped(block, r, k, gamma, theta);
    count += out.x[count] > 0.0;
  }
  out.count = count;
  if (!cut) return;
  // Where r is much larger than gamma the root leaves rounding errors of r's size in w'x - d: they are taken back.
  double left = block.cap, square = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const double w = block.w(out.at[i]);
    left -= w * out.x[i];
    square += out.x[i] < block.u(out.at[i]) ? w * w : 0.0;
  }
  for (int64_t i = 0; i < count && square > 0.0; ++i) {
    const double u = block.u(out.at[i]);
    if (out.x[i] < u) out.x[i] = std::min(std::max(out.x[i] + left * block.w(out.at[i]) / square, 0.0), u);
  }
}

// A vertex of the capped box has no entry strictly between its bounds, or one when the cut is tight.
template <class T>
inline bool at_vertex(const Block<T>& block, const Support& out) {
  int64_t between = 0;
  double total = 0.0;
  for (int64_t i = 0; i < out.count; ++i) {
    total += block.w(out.at[i]) * out.x[i];
    between += out.x[i] < block.u(out.at[i]) * (1.0 - 1e-12);
  }
  return between == 0 || (between == 1 && total >= block.cap * (1.0 - 1e-12));
}

}  // namespace core_tensor

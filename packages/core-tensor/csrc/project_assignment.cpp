// Projection of blocks onto the hull of assignments by Wolfe's nearest-point method (see core_tensor/project_assignment).
// A vertex is the item of every slot, so inner products of vertices are counts, exact whatever the size of the point.
// The best vertex of a direction comes from shortest augmenting paths, one per slot, over the items.
#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "core.h"

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kTolerance = 1e-15;  // of (y - x)'(q - x), relative to the products' own size
constexpr double kNone = 1e-14;       // weights below it are zero
constexpr double kLargest = 1e150;    // products of larger values overflow

struct Scratch {
  int64_t items, slots, columns;
  std::vector<double> gain;             // (slots, columns): the direction, an empty slot's columns behind the items
  std::vector<double> u, v, distance;   // potentials of slots and columns, and path lengths
  std::vector<int32_t> owner, from;     // slot of a column, and the column before it on the path; one more for the root
  std::vector<uint8_t> done;
  std::vector<double> x, step, moved;   // (items * slots)
  std::vector<double> gram, alpha;

  // Memory for a block of this many items.
  void fit(int64_t of_block, bool filled) {
    items = of_block;
    columns = items + (filled ? 0 : slots);
    gain.resize(slots * columns);
    u.resize(slots);
    v.resize(columns + 1);
    distance.resize(columns + 1);
    owner.resize(columns + 1);
    from.resize(columns + 1);
    done.resize(columns + 1);
  }
};

// Slot by slot, a shortest augmenting path from the slot to a free column; `vertex` receives the item of every slot.
CT_CLONES void best_vertex(Scratch& s, const double* direction, bool filled, int32_t* vertex) {
  const int64_t n = s.items, k = s.slots, columns = s.columns;
  double* gain = s.gain.data();
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) gain[j * columns + i] = direction[i * k + j];
  if (!filled)
    for (int64_t j = 0; j < k; ++j) std::fill(gain + j * columns + n, gain + (j + 1) * columns, 0.0);
  double* v = s.v.data();
  double* distance = s.distance.data();
  int32_t* from = s.from.data();
  uint8_t* done = s.done.data();
  std::fill(s.u.begin(), s.u.end(), 0.0);
  std::fill(s.v.begin(), s.v.end(), 0.0);
  std::fill(s.owner.begin(), s.owner.end(), -1);
  const int32_t root = static_cast<int32_t>(columns);
  for (int32_t slot = 0; slot < k; ++slot) {
    std::fill(s.distance.begin(), s.distance.end(), kInfinity);
    std::fill(s.done.begin(), s.done.end(), 0);
    s.owner[root] = slot;
    int32_t at = root;
    do {  // Dijkstra over reduced costs u - gain - v >= 0
      done[at] = 1;
      const int32_t row = s.owner[at];
      const double* g = gain + row * columns;
      const double base = s.u[row];
      double least = kInfinity;
      int32_t next = root;
      for (int32_t c = 0; c < columns; ++c) {
        if (done[c]) continue;
        const double reduced = -g[c] - base - v[c];
        if (reduced < distance[c]) {
          distance[c] = reduced;
          from[c] = at;
        }
        if (distance[c] < least) {
          least = distance[c];
          next = c;
        }
      }
      for (int32_t c = 0; c <= columns; ++c) {
        if (done[c]) {
          s.u[s.owner[c]] += least;
          v[c] -= least;
        } else {
          distance[c] -= least;
        }
      }
      at = next;
    } while (s.owner[at] >= 0);
    while (at != root) {
      s.owner[at] = s.owner[from[at]];
      at = from[at];
    }
  }
  std::fill(vertex, vertex + k, -1);
  for (int32_t c = 0; c < n; ++c)
    if (s.owner[c] >= 0 && (filled || direction[c * k + s.owner[c]] > 0.0)) vertex[s.owner[c]] = c;
}

struct Corral {
  std::vector<int32_t> vertices;  // (count, slots)
  std::vector<double> weights;
  int64_t count() const { return static_cast<int64_t>(weights.size()); }
};

int64_t shared(const int32_t* a, const int32_t* b, int64_t slots) {
  int64_t found = 0;
  for (int64_t j = 0; j < slots; ++j) found += a[j] >= 0 && a[j] == b[j];
  return found;
}

// Coordinates of the nearest point of the affine hull, along the differences from the first vertex; false if the
// vertices depend on each other.
bool affine(Scratch& s, const Corral& c, const double* y) {
  const int64_t k = s.slots, m = c.count() - 1;
  const int32_t* first = c.vertices.data();
  s.gram.resize(m * m);
  s.alpha.resize(m + 1);
  const double own = static_cast<double>(shared(first, first, k));
  for (int64_t a = 0; a < m; ++a) {
    const int32_t* p = first + (a + 1) * k;
    const double with_first = static_cast<double>(shared(p, first, k));
    double right = own - with_first;
    for (int64_t j = 0; j < k; ++j) {
      if (p[j] == first[j]) continue;
      right += (p[j] >= 0 ? y[p[j] * k + j] : 0.0) - (first[j] >= 0 ? y[first[j] * k + j] : 0.0);
    }
    s.alpha[a + 1] = right;
    for (int64_t b = 0; b <= a; ++b) {
      const int32_t* q = first + (b + 1) * k;
      s.gram[a * m + b] =
          static_cast<double>(shared(p, q, k) - shared(q, first, k)) - with_first + own;
    }
  }
  double* x = s.alpha.data() + 1;
  double* L = s.gram.data();
  for (int64_t a = 0; a < m; ++a) {  // Cholesky of a matrix of whole numbers, then both substitutions
    for (int64_t b = 0; b <= a; ++b) {
      double sum = L[a * m + b];
      for (int64_t i = 0; i < b; ++i) sum -= L[a * m + i] * L[b * m + i];
      if (a == b) {
        if (sum <= 1e-9) return false;
        L[a * m + a] = std::sqrt(sum);
      } else {
        L[a * m + b] = sum / L[b * m + b];
      }
    }
    for (int64_t b = 0; b < a; ++b) x[a] -= L[a * m + b] * x[b];
    x[a] /= L[a * m + a];
  }
  double total = 0.0;
  for (int64_t a = m - 1; a >= 0; --a) {
    for (int64_t b = a + 1; b < m; ++b) x[a] -= L[b * m + a] * x[b];
    x[a] /= L[a * m + a];
    total += x[a];
  }
  s.alpha[0] = 1.0 - total;
  return true;
}

// Keeps the vertices with weight, and makes their weights sum to one.
void compact(Corral& c, const std::vector<double>& weights, int64_t slots) {
  int64_t kept = 0;
  double total = 0.0;
  for (int64_t a = 0; a < c.count(); ++a) {
    if (weights[a] <= kNone) continue;
    std::copy_n(c.vertices.data() + a * slots, slots, c.vertices.data() + kept * slots);
    total += weights[a];
    c.weights[kept++] = weights[a];
  }
  c.weights.resize(kept);
  c.vertices.resize(kept * slots);
  for (double& w : c.weights) w /= total;
}

// Moves to the affine minimiser; where that leaves the hull, stops at its boundary and drops what fell to zero.
bool minor(Scratch& s, Corral& c, const double* y) {
  while (c.count() > 1) {
    if (!affine(s, c, y)) return false;
    const std::vector<double>& alpha = s.alpha;
    double theta = 1.0;
    int64_t leaving = -1;
    bool inside = true;
    for (int64_t a = 0; a < c.count(); ++a) {
      inside = inside && alpha[a] > -kNone;
      if (alpha[a] >= 0.0) continue;
      const double reach = c.weights[a] / (c.weights[a] - alpha[a]);
      if (leaving < 0 || reach < theta) theta = reach, leaving = a;
    }
    if (inside) {
      const std::vector<double> weights(alpha.begin(), alpha.begin() + c.count());
      compact(c, weights, s.slots);
      return true;
    }
    std::vector<double> weights(c.weights);
    for (int64_t a = 0; a < c.count(); ++a) weights[a] += theta * (alpha[a] - weights[a]);
    weights[leaving] = 0.0;
    compact(c, weights, s.slots);
  }
  c.weights[0] = 1.0;
  return true;
}

void place(const Corral& c, int64_t slots, std::vector<double>& x) {
  std::fill(x.begin(), x.end(), 0.0);
  for (int64_t a = 0; a < c.count(); ++a)
    for (int64_t j = 0; j < slots; ++j)
      if (const int32_t i = c.vertices[a * slots + j]; i >= 0) x[i * slots + j] += c.weights[a];
}

// The corral of the projection of y; false if it outgrew its limit.
bool project(Scratch& s, const double* y, int64_t limit, bool filled, Corral& c) {
  const int64_t n = s.items * s.slots, k = s.slots;
  s.x.resize(n);
  s.step.resize(n);
  s.moved.resize(n);
  std::vector<int32_t> q(k);
  best_vertex(s, y, filled, q.data());
  c.vertices = q;
  c.weights.assign(1, 1.0);
  place(c, k, s.x);
  Corral next;
  for (int64_t round = 0; round < 1000 + 10 * n; ++round) {
    for (int64_t i = 0; i < n; ++i) s.step[i] = y[i] - s.x[i];
    best_vertex(s, s.step.data(), filled, q.data());
    double at_x = 0.0, at_q = 0.0, gain = 0.0;
    for (int64_t i = 0; i < n; ++i) s.moved[i] = -s.x[i];
    for (int64_t j = 0; j < k; ++j) {
      if (q[j] < 0) continue;
      s.moved[q[j] * k + j] += 1.0;
      at_q += s.step[q[j] * k + j];
    }
    for (int64_t i = 0; i < n; ++i) {
      gain += s.step[i] * s.moved[i];
      at_x += s.step[i] * s.x[i];
    }
    if (gain <= kTolerance * (1.0 + std::abs(at_x) + std::abs(at_q))) return true;
    for (int64_t a = 0; a < c.count(); ++a)
      if (std::equal(q.begin(), q.end(), c.vertices.begin() + a * k)) return true;
    if (c.count() >= limit) return false;
    next = c;
    next.vertices.insert(next.vertices.end(), q.begin(), q.end());
    next.weights.push_back(0.0);
    if (!minor(s, next, y)) return false;
    place(next, k, s.moved);
    double along = 0.0, square = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      const double d = s.moved[i] - s.x[i];
      along += s.step[i] * d;
      square += d * d;
    }
    if (along <= 0.5 * square) return true;  // ||y - x|| no longer falls: all that rounding allows
    std::swap(c, next);
    std::swap(s.x, s.moved);
  }
  return false;
}

// Whether the values are numbers whose products stay in range.
CT_CLONES bool in_range(const double* values, int64_t variables) {
  int64_t outside = 0;
  for (int64_t i = 0; i < variables; ++i) outside += !(std::abs(values[i]) <= kLargest);
  return outside == 0;
}

// Whether the offsets rise over all variables, in blocks of whole items and of enough of them to fill the slots.
bool are_blocks(const int64_t* offsets, int64_t variables, int64_t blocks, int64_t slots, bool filled) {
  for (int64_t b = 0; b < blocks; ++b)
    if (offsets[b + 1] < offsets[b]) return false;
  // rising, so unsigned differences cannot overflow
  if (static_cast<uint64_t>(offsets[blocks]) - static_cast<uint64_t>(offsets[0]) != static_cast<uint64_t>(variables))
    return false;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t n = offsets[b + 1] - offsets[b];
    if (n > INT32_MAX || n % slots != 0 || (filled && n > 0 && n / slots < slots)) return false;
  }
  return true;
}

}  // namespace

// Returns 1, 0 for values or offsets that do not fit (nothing is written then), or -1 if there is too little memory.
CT_EXPORT int ct_project_assignment(const double* values, const int64_t* offsets, double* x, double* weights,
                                    int32_t* items, int64_t variables, int64_t blocks, int64_t slots, int64_t limit,
                                    int filled, int threads) {
  if (!in_range(values, variables) || !are_blocks(offsets, variables, blocks, slots, filled != 0)) return 0;
  int result = 1;
#pragma omp parallel num_threads(threads)
  {
    Scratch s;
    s.slots = slots;
    Corral c;
#pragma omp for schedule(dynamic, 16)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = offsets[b] - offsets[0], n = offsets[b + 1] - offsets[b];
      std::fill_n(x + first, n, 0.0);
      std::fill_n(weights + b * limit, limit, 0.0);
      std::fill_n(items + b * limit * slots, limit * slots, -1);
      if (n == 0) continue;
      try {  // an exception must not leave a parallel region
        s.fit(n / slots, filled != 0);
        if (!project(s, values + first, limit, filled != 0, c)) continue;
      } catch (const std::bad_alloc&) {
#pragma omp atomic write
        result = -1;
        continue;
      }
      std::copy(s.x.begin(), s.x.end(), x + first);
      std::copy(c.weights.begin(), c.weights.end(), weights + b * limit);
      std::copy(c.vertices.begin(), c.vertices.end(), items + b * limit * slots);
    }
  }
  return result;
}

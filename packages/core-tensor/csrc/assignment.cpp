// Exact linear assignment by shortest augmenting paths, started by column reduction, reduction transfer and augmenting
// row reduction (see core_tensor/assignment; Jonker and Volgenant 1987). Rows are people, columns objects, v their
// prices. Every inner loop runs over all columns without a branch, because a vector of four does more in that time than
// a list of the columns that are still open saves.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core.h"

namespace {

constexpr double kClosed = 1e300;  // added to the distance of a column that is in the tree already
constexpr int64_t kLanes = 8;      // independent minima, so that the compiler may keep them in vectors

CT_INLINE double least(const double* a, int64_t n) {
  double m[kLanes];
  for (int64_t k = 0; k < kLanes; ++k) m[k] = kClosed;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) m[k] = a[j + k] < m[k] ? a[j + k] : m[k];
  for (; j < n; ++j) m[0] = a[j] < m[0] ? a[j] : m[0];
  double result = m[0];
  for (int64_t k = 1; k < kLanes; ++k) result = m[k] < result ? m[k] : result;
  return result;
}

// The first index from `start` on that holds a value known to be there, or n.
CT_INLINE int64_t find(const double* a, double value, int64_t start, int64_t n) {
  int64_t j = start;
  for (; j + kLanes <= n; j += kLanes) {
    int any = 0;
    for (int64_t k = 0; k < kLanes; ++k) any |= a[j + k] == value;
    if (any) break;
  }
  for (; j < n; ++j)
    if (a[j] == value) return j;
  return n;
}

struct State {
  int64_t n;
  const double* cost;                // (n, n)
  int64_t* column;                   // (n): column of every row
  std::vector<int64_t> row;          // row of every column, -1 for a free one
  std::vector<double> v;             // price of every column
  std::vector<double> reduced;       // c - v of the row at hand, or a key of every column
  std::vector<double> distance, shut;
  std::vector<int64_t> from;         // row before a column on the shortest path
  std::vector<int64_t> open;         // rows without a column
};

// Every column's price becomes its least cost; a row that is the only cheapest one of some column gets it.
CT_CLONES void reduce_columns(State& s) {
  const int64_t n = s.n;
  std::vector<int64_t>& at = s.from;
  double* v = s.v.data();
  std::memcpy(v, s.cost, n * sizeof(double));
  std::fill(at.begin(), at.end(), 0);
  for (int64_t i = 1; i < n; ++i) {
    const double* c = s.cost + i * n;
    for (int64_t j = 0; j < n; ++j) {
      at[j] = c[j] < v[j] ? i : at[j];
      v[j] = c[j] < v[j] ? c[j] : v[j];
    }
  }
  std::vector<uint8_t> taken(n, 0);
  std::fill(s.column, s.column + n, -1);
  for (int64_t j = n - 1; j >= 0; --j) {
    const int64_t i = at[j];
    s.row[j] = taken[i] ? -1 : i;
    if (!taken[i]) s.column[i] = j;
    taken[i] = taken[i] < 2 ? taken[i] + 1 : 2;
  }
  for (int64_t i = 0; i < n; ++i) {  // transfer: a row that no other column wants can bear a lower price of its own
    if (taken[i] == 0) s.open.push_back(i);
    if (taken[i] != 1) continue;
    const double* c = s.cost + i * n;
    for (int64_t j = 0; j < n; ++j) s.reduced[j] = c[j] - v[j];
    s.reduced[s.column[i]] = kClosed;
    if (n > 1) v[s.column[i]] -= least(s.reduced.data(), n);
  }
}

// Open rows bid for their cheapest column; who is outbid bids again. A bounded number of bids: the rest is left to paths.
CT_CLONES void reduce_rows(State& s) {
  const int64_t n = s.n;
  double* v = s.v.data();
  double* reduced = s.reduced.data();
  std::vector<int64_t> waiting = std::move(s.open);
  s.open.clear();
  int64_t bids = 0;
  while (!waiting.empty()) {
    const int64_t i = waiting.back();
    waiting.pop_back();
    if (bids++ >= 4 * n) {
      s.open.push_back(i);
      continue;
    }
    const double* c = s.cost + i * n;
    for (int64_t j = 0; j < n; ++j) reduced[j] = c[j] - v[j];
    const double first = least(reduced, n);
    int64_t j = find(reduced, first, 0, n);
    reduced[j] = kClosed;
    const double second = least(reduced, n);
    const double price = v[j] - (second - first);
    const bool falls = price < v[j];
    if (falls) {
      v[j] = price;
    } else if (s.row[j] >= 0) {
      j = find(reduced, second, 0, n);
    }
    const int64_t ousted = s.row[j];
    s.row[j] = i;
    s.column[i] = j;
    if (ousted < 0) continue;
    s.column[ousted] = -1;
    (falls ? waiting : s.open).push_back(ousted);
  }
}

// One step of Dijkstra's algorithm: distances through row i, and the nearest open column.
CT_CLONES int64_t scan(State& s, int64_t i, double base) {
  const int64_t n = s.n;
  const double* c = s.cost + i * n;
  const double* v = s.v.data();
  const double* shut = s.shut.data();
  double* distance = s.distance.data();
  double* key = s.reduced.data();
  int64_t* from = s.from.data();
  for (int64_t j = 0; j < n; ++j) {
    const double through = base + (c[j] - v[j]) + shut[j];
    from[j] = through < distance[j] ? i : from[j];
    distance[j] = through < distance[j] ? through : distance[j];
    key[j] = distance[j] + shut[j];
  }
  const double nearest = least(key, n);
  const int64_t first = find(key, nearest, 0, n);
  // among columns at the same distance a free one ends the path
  for (int64_t j = first; j < n; j = find(key, nearest, j + 1, n))
    if (s.row[j] < 0) return j;
  return first;
}

void augment(State& s, int64_t start) {
  const int64_t n = s.n;
  std::fill(s.distance.begin(), s.distance.end(), kClosed);
  std::fill(s.shut.begin(), s.shut.end(), 0.0);
  std::vector<int64_t> tree;
  int64_t i = start, j = 0;
  double base = 0.0;
  while (true) {
    j = scan(s, i, base);
    if (s.row[j] < 0) break;
    s.shut[j] = kClosed;
    tree.push_back(j);
    i = s.row[j];
    base = s.distance[j] - (s.cost[i * n + j] - s.v[j]);
  }
  for (const int64_t k : tree) s.v[k] += s.distance[k] - s.distance[j];
  for (i = -1; i != start;) {
    i = s.from[j];
    s.row[j] = i;
    std::swap(j, s.column[i]);
  }
}

void solve(int64_t n, const double* cost, int64_t* column) {
  State s{n, cost, column, {}, {}, {}, {}, {}, {}, {}};
  s.row.resize(n);
  s.from.resize(n);
  for (std::vector<double>* a : {&s.v, &s.reduced, &s.distance, &s.shut}) a->resize(n);
  reduce_columns(s);
  reduce_rows(s);
  for (const int64_t i : s.open) augment(s, i);
}

// Whether no cost is NaN, or so large that sums overflow: the search would leave its arrays.
CT_CLONES bool in_range(const double* cost, int64_t count) {
  int64_t outside = 0;
  for (int64_t i = 0; i < count; ++i) outside += !(std::abs(cost[i]) < 1e200);
  return outside == 0;
}

}  // namespace

// Returns 1, or 0 for costs out of range.
CT_EXPORT int ct_assignment(const double* cost, int64_t* columns, int64_t batch, int64_t n, int threads) {
  if (!in_range(cost, batch * n * n)) return 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t b = 0; b < batch; ++b) solve(n, cost + b * n * n, columns + b * n);
  return 1;
}

// Lazy Adam or row-wise Adagrad on the rows of a table that a batch names (see core_tensor/row_update).
//
// 1. An open-addressing hash table gives every distinct id a number in order of first appearance, and gradients are
//    added up under that number: no sort. 2. The rows are updated. With several threads each takes the ids whose hash
//    falls to it, so the sum of a row has one order.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core.h"

namespace {

constexpr int64_t kAhead = 16;  // rows that are asked for before they are needed

struct Options {
  float lr, beta1, beta2, new1, new2, eps, keep, bias1, root_bias2;  // new = 1 - beta, keep = 1 - lr * weight decay
};

CT_INLINE uint64_t scatter(int64_t id) { return static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u; }

CT_CLONES void adam_rows(const int64_t* rows, const float* sums, int64_t count, int64_t d, float* weight, float* first,
                         float* second, const Options& o) {
  const float rate = o.lr / o.bias1, b1 = o.beta1, b2 = o.beta2, c1 = o.new1, c2 = o.new2;
  for (int64_t u = 0; u < count; ++u) {
    if (u + kAhead < count) {
      const int64_t ahead = rows[u + kAhead] * d;
      __builtin_prefetch(weight + ahead, 1);
      __builtin_prefetch(first + ahead, 1);
      __builtin_prefetch(second + ahead, 1);
    }
    float *w = weight + rows[u] * d, *m = first + rows[u] * d, *v = second + rows[u] * d;
    const float* g = sums + u * d;
#pragma GCC ivdep
    for (int64_t j = 0; j < d; ++j) {
      m[j] = b1 * m[j] + c1 * g[j];
      v[j] = b2 * v[j] + c2 * g[j] * g[j];
      w[j] = o.keep * w[j] - rate * m[j] / (std::sqrt(v[j]) / o.root_bias2 + o.eps);
    }
  }
}

CT_CLONES void adagrad_rows(const int64_t* rows, const float* sums, int64_t count, int64_t d, float* weight,
                            float* accumulator, const Options& o) {
  for (int64_t u = 0; u < count; ++u) {
    if (u + kAhead < count) {
      __builtin_prefetch(weight + rows[u + kAhead] * d, 1);
      __builtin_prefetch(accumulator + rows[u + kAhead], 1);
    }
    float* w = weight + rows[u] * d;
    const float* g = sums + u * d;
    float square = 0;
    for (int64_t j = 0; j < d; ++j) square += g[j] * g[j];
    accumulator[rows[u]] += square / static_cast<float>(d);
    const float rate = o.lr / (std::sqrt(accumulator[rows[u]]) + o.eps);
    for (int64_t j = 0; j < d; ++j) w[j] = o.keep * w[j] - rate * g[j];
  }
}

CT_CLONES void add_up(const int64_t* numbers, const float* grad, int64_t n, int64_t d, float* sums) {
  for (int64_t i = 0; i < n; ++i) {
    if (numbers[i] < 0) continue;  // another thread's
    float* sum = sums + numbers[i] * d;
    const float* g = grad + i * d;
#pragma GCC ivdep
    for (int64_t j = 0; j < d; ++j) sum[j] += g[j];
  }
}

// Numbers the distinct ids of part `part` of `parts`; -1 for the ids of other parts.
std::vector<int64_t> number(const int64_t* ids, int64_t n, int part, int parts, std::vector<int64_t>& numbers) {
  int bits = 4;
  while ((int64_t{1} << bits) < 2 * n / parts + 16) ++bits;
  std::vector<int64_t> table, rows;
  const auto clear = [&] { table.assign(size_t{1} << bits, -1); };
  clear();
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t hash = scatter(ids[i]);
    if (parts > 1 && static_cast<int>((hash >> 20) % parts) != part) {
      numbers[i] = -1;
      continue;
    }
    if (2 * rows.size() >= table.size()) {  // an uneven split: double, and enter the rows again
      ++bits;
      clear();
      for (size_t u = 0; u < rows.size(); ++u) {
        uint64_t at = scatter(rows[u]) >> (64 - bits);
        while (table[at] >= 0) at = (at + 1) & (table.size() - 1);
        table[at] = static_cast<int64_t>(u);
      }
    }
    uint64_t at = hash >> (64 - bits);
    while (table[at] >= 0 && rows[table[at]] != ids[i]) at = (at + 1) & (table.size() - 1);
    if (table[at] < 0) {
      table[at] = static_cast<int64_t>(rows.size());
      rows.push_back(ids[i]);
    }
    numbers[i] = table[at];
  }
  return rows;
}

}  // namespace

// Ids are in range and gradients finite: the caller has checked.
CT_EXPORT void ct_row_update(float* weight, float* first, float* second, const int64_t* ids, const float* grad,
                             int64_t n, int64_t d, int adagrad, double lr, double beta1, double beta2, double eps,
                             double weight_decay, double bias1, double bias2, int threads) {
  const Options o{static_cast<float>(lr),    static_cast<float>(beta1),
                  static_cast<float>(beta2), static_cast<float>(1 - beta1),
                  static_cast<float>(1 - beta2), static_cast<float>(eps),
                  static_cast<float>(1 - lr * weight_decay), static_cast<float>(bias1),
                  static_cast<float>(std::sqrt(bias2))};
  const int parts = n < 4096 ? 1 : std::max(threads, 1);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int part = 0; part < parts; ++part) {
    std::vector<int64_t> numbers(n);
    const std::vector<int64_t> rows = number(ids, n, part, parts, numbers);
    const int64_t count = static_cast<int64_t>(rows.size());
    std::vector<float> sums(count * d, 0.0f);
    add_up(numbers.data(), grad, n, d, sums.data());
    if (adagrad)
      adagrad_rows(rows.data(), sums.data(), count, d, weight, second, o);
    else
      adam_rows(rows.data(), sums.data(), count, d, weight, first, second, o);
  }
}

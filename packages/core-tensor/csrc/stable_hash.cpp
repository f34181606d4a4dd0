// XXH64 of byte strings or int64 values, and further hashes from splitmix64 seeded with the first (see
// core_tensor/stable_hash). Little-endian machines only, as torch's own.
#include <cstring>

#include "core.h"

namespace {

constexpr uint64_t kP1 = 0x9E3779B185EBCA87u, kP2 = 0xC2B2AE3D27D4EB4Fu, kP3 = 0x165667B19E3779F9u,
                   kP4 = 0x85EBCA77C2B2AE63u, kP5 = 0x27D4EB2F165667C5u, kGamma = 0x9E3779B97F4A7C15u;

CT_INLINE uint64_t rotate(uint64_t x, int by) { return (x << by) | (x >> (64 - by)); }
CT_INLINE uint64_t round(uint64_t accumulator, uint64_t word) { return rotate(accumulator + word * kP2, 31) * kP1; }

template <class T>
CT_INLINE T load(const uint8_t* p) {
  T word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

uint64_t xxh64(const uint8_t* p, int64_t length, uint64_t seed) {
  const uint8_t* const end = p + length;
  uint64_t value;
  if (length >= 32) {
    uint64_t lanes[4] = {seed + kP1 + kP2, seed + kP2, seed, seed - kP1};
    for (; end - p >= 32; p += 32)
      for (int i = 0; i < 4; ++i) lanes[i] = round(lanes[i], load<uint64_t>(p + 8 * i));
    value = rotate(lanes[0], 1) + rotate(lanes[1], 7) + rotate(lanes[2], 12) + rotate(lanes[3], 18);
    for (uint64_t lane : lanes) value = (value ^ round(0, lane)) * kP1 + kP4;
  } else {
    value = seed + kP5;
  }
  value += static_cast<uint64_t>(length);
  for (; end - p >= 8; p += 8) value = rotate(value ^ round(0, load<uint64_t>(p)), 27) * kP1 + kP4;
  if (end - p >= 4) {
    value = rotate(value ^ (load<uint32_t>(p) * kP1), 23) * kP2 + kP3;
    p += 4;
  }
  for (; p < end; ++p) value = rotate(value ^ (*p * kP5), 11) * kP1;
  value = (value ^ (value >> 33)) * kP2;
  value = (value ^ (value >> 29)) * kP3;
  return value ^ (value >> 32);
}

CT_INLINE uint64_t splitmix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

// `offsets` is null where `values` holds int64.
CT_EXPORT void ct_stable_hash(const uint8_t* values, const int64_t* offsets, int64_t n, int64_t seed,
                              const int64_t* moduli, int64_t k, int64_t* hashes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    const int64_t start = offsets ? offsets[i] : 8 * i, end = offsets ? offsets[i + 1] : 8 * i + 8;
    const uint64_t first = xxh64(values + start, end - start, static_cast<uint64_t>(seed));
    for (int64_t j = 0; j < k; ++j) {
      const uint64_t hash = j == 0 ? first : splitmix64(first + static_cast<uint64_t>(j) * kGamma);
      hashes[i * k + j] = static_cast<int64_t>(moduli[j] ? hash % static_cast<uint64_t>(moduli[j]) : hash);
    }
  }
}

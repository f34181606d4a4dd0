// Shared by every kernel: the export mark and the two ways to serve every x86-64 level from one binary.
#pragma once
#include <cstdint>

#define CT_EXPORT extern "C" __attribute__((visibility("default")))
#define CT_INLINE __attribute__((always_inline)) inline
#define CT_INLINE_LAMBDA __attribute__((always_inline))

// 1. Loops that the compiler vectorizes by itself: put CT_CLONES on the function that holds the hot loop and keep the
//    OpenMP pragma in its caller (the bodies that the compiler outlines for OpenMP are not cloned).
// 2. Kernels written in vectors of a fixed width: instantiate the template at 64, 32 and 16 bytes behind CT_V4, CT_V3
//    and no mark, and choose by ct_level(). Cloning would not do: a 64-byte vector is emulated in memory below AVX-512.
#ifdef CORE_TENSOR_X86_LEVELS
#define CT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#define CT_V4 __attribute__((target("arch=x86-64-v4"), noinline))
#define CT_V3 __attribute__((target("arch=x86-64-v3"), noinline))
inline int ct_level() {
  static const int level = __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 2;
  return level;
}
#else
#define CT_CLONES
#define CT_V4
#define CT_V3
inline int ct_level() { return 2; }
#endif

// What a kernel is handed may come from a file: numbers that it follows as indices are looked at before anything is read
// or written through them. A kernel that refuses returns 0, and its caller in Python says why.

// Whether all numbers lie in [0, size).
inline bool are_indices(const int64_t* values, int64_t count, int64_t size) {
  int outside = 0;
  for (int64_t i = 0; i < count; ++i) outside |= static_cast<uint64_t>(values[i]) >= static_cast<uint64_t>(size);
  return outside == 0;
}

// Whether `count` + 1 numbers rise from 0 to `end`.
inline bool are_offsets(const int64_t* values, int64_t count, int64_t end) {
  int falls = values[0] != 0 || values[count] != end;
  for (int64_t i = 0; i < count; ++i) falls |= values[i + 1] < values[i];
  return falls == 0;
}

// A sum of 64 bits that wraps around instead of being undefined.
CT_INLINE int64_t wrapping_sum(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}

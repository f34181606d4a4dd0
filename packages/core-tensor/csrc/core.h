// Shared by every kernel: the export mark and the two ways to serve every x86-64 level from one binary.
#pragma once
#include <cstdint>

#define CT_EXPORT extern "C" __attribute__((visibility("default")))
#define CT_INLINE __attribute__((always_inline)) inline
#define CT_INLINE_LAMBDA __attribute__((always_inline))

// 1. Loops that the compiler vectorises by itself: put CT_CLONES on the function that holds the hot loop and keep the
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

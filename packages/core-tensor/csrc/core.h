// Shared by every kernel: the export mark, the clones mark, and the thread-count rule.
#pragma once
#include <cstdint>

#define CT_EXPORT extern "C" __attribute__((visibility("default")))

// Put CT_CLONES on the inner function that holds the hot loop and keep the OpenMP pragma in its caller:
// the bodies that the compiler outlines for OpenMP are not cloned.
#ifdef CORE_TENSOR_TARGET_CLONES
#define CT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define CT_CLONES
#endif

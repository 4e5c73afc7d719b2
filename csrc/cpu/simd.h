// Four doubles at a time through the compiler's vector types, and the macros that compile a function for
// several instruction sets, of which the loader picks the best this processor has, or for AVX-512 alone. A
// helper of such a function must be LRC_INLINE, or it stays compiled for the oldest processor.
#pragma once

#include <cstdint>

#include "device.h"

// Sanitized programs go without: their run time is not up yet when the loader resolves the clones.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && \
    !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define LRC_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
// Only for processors with AVX-512.
#define LRC_AVX512 __attribute__((target("arch=x86-64-v4")))
#else
#define LRC_MULTIVERSION
#endif

namespace lrc {

// Whether the processor has it; and whether it must, for what is LRC_AVX512.
#ifdef LRC_AVX512
inline bool has_avx512() { return __builtin_cpu_supports("x86-64-v4") != 0; }
inline constexpr bool kNeedsAvx512 = true;
#else
#define LRC_AVX512
inline bool has_avx512() { return false; }
inline constexpr bool kNeedsAvx512 = false;
#endif

typedef double Vec __attribute__((vector_size(32), may_alias));
typedef double LooseVec __attribute__((vector_size(32), aligned(8), may_alias));
typedef std::uint64_t VecBits __attribute__((vector_size(32), may_alias));
inline constexpr std::int64_t kLanes = 4;

// Pointers are aligned to sizeof(Vec).
LRC_INLINE Vec load(const double* p) { return *reinterpret_cast<const Vec*>(p); }
LRC_INLINE void store(double* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
// The same of any pointer.
LRC_INLINE Vec load_any(const double* p) { return *reinterpret_cast<const LooseVec*>(p); }
LRC_INLINE void store_any(double* p, Vec x) { *reinterpret_cast<LooseVec*>(p) = x; }
LRC_INLINE Vec splat(double x) { return Vec{x, x, x, x}; }
LRC_INLINE double sum(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }

// Rounded up to whole vectors.
inline constexpr std::int64_t padded(std::int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

}  // namespace lrc

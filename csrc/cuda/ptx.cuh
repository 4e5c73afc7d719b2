// Every instruction that C++ has no word for, behind an inline function. Compiled by g++, each is the twin of
// the same name in tests/csrc/emulation/instructions.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "math/floats.h"

namespace lrc {

// Registers read or written at once, which must be aligned.
struct __attribute__((may_alias, aligned(16))) Words4 {
    std::uint32_t word[4];
};

#ifdef __CUDACC__
__device__ inline float to_float(Half x) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
    return result;
}

// Two floats rounded to nearest, `low` in the lower half.
template <class T> __device__ inline std::uint32_t pack(float low, float high) {
    std::uint32_t result;
    if constexpr (std::is_same_v<T, Half>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    }
    return result;
}

// Four 8 x 8 matrices of 16-bit entries from shared memory: lane i points at 16 bytes, row i % 8 of matrix
// i / 8. Lane i gets entries 2 (i % 4) and the next one of row i / 4 of each.
__device__ inline Words4 load_matrices(const void* row) {
    Words4 result;
    const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result.word[0]), "=r"(result.word[1]), "=r"(result.word[2]), "=r"(result.word[3])
                 : "r"(address)
                 : "memory");
    return result;
}

// sums [16, 8] += a [16, 16] b [16, 8] by the warp. In lane i, with g = i / 4 and t = 2 (i % 4): sums holds
// (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1); each word of a two entries from (g, t), (g + 8, t),
// (g, t + 8), (g + 8, t + 8) on along a row; b0 and b1 two entries from (t, g), (t + 8, g) on along a column.
template <class T>
__device__ inline void multiply_add(float (&sums)[4], const Words4& a, std::uint32_t b0, std::uint32_t b1) {
    if constexpr (std::is_same_v<T, Half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
    }
}

// Begins to copy 16 aligned bytes to shared memory, zeros where `from` may not be read.
__device__ inline void copy_async(void* to, const void* from, bool readable) {
    const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(readable ? 16 : 0)
                 : "memory");
}

// Makes a group of the copies this thread has begun since the last call.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the last `kPending` groups of this thread.
template <int kPending> __device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Lets the next grid, if it was launched to overlap, start before this one ends.
__device__ inline void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the grid that this one overlaps has ended and what it wrote is visible.
__device__ inline void wait_for_last_grid() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
#else
using emulation::commit_copies;
using emulation::copy_async;
using emulation::let_next_grid_start;
using emulation::wait_for_copies;
using emulation::wait_for_last_grid;

inline float to_float(Half x) { return emulation::half_to_float(x.bits); }

template <class T> std::uint32_t pack(float low, float high) {
    const auto bits = [](float x) -> std::uint32_t {
        if constexpr (std::is_same_v<T, Half>) {
            return emulation::float_to_half(x);
        } else {
            return from_float<T>(x).bits;
        }
    };
    return bits(low) | bits(high) << 16;
}

inline Words4 load_matrices(const void* row) { return std::bit_cast<Words4>(emulation::load_matrices(row)); }

template <class T> void multiply_add(float (&sums)[4], const Words4& a, std::uint32_t b0, std::uint32_t b1) {
    const std::uint32_t fragments[6] = {a.word[0], a.word[1], a.word[2], a.word[3], b0, b1};
    emulation::multiply_add(sums, fragments, [](std::uint16_t bits) { return to_float(T{bits}); });
}
#endif

}  // namespace lrc

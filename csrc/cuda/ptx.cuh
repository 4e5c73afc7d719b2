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
template <class T> inline constexpr int kWideEntries = sizeof(Words4) / sizeof(T);

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

// sums [16, 8] += a [16, 8] b [8, 8] by the warp, in TF32: of each entry, a float, the upper 19 bits are
// read. In lane i, with g = i / 4 and t = i % 4: sums as above; a holds (g, t), (g + 8, t), (g, t + 4), (g +
// 8, t + 4); b0 and b1 are (t, g) and (t + 4, g).
__device__ inline void multiply_add_tf32(float (&sums)[4], const Words4& a, std::uint32_t b0,
                                         std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
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

inline void multiply_add_tf32(float (&sums)[4], const Words4& a, std::uint32_t b0, std::uint32_t b1) {
    emulation::multiply_add_tf32(sums, {a.word[0], a.word[1], a.word[2], a.word[3], b0, b1});
}
#endif

__device__ inline std::uint32_t bits_of(float x) { return std::bit_cast<std::uint32_t>(x); }
template <class T> __device__ std::uint32_t bits_of(T x) { return x.bits; }

template <class T> __device__ T round_to(float x) {
    if constexpr (std::is_same_v<T, float>) {
        return x;
    } else {
        return {static_cast<std::uint16_t>(pack<T>(x, 0))};
    }
}

// One of the words of 16 bytes, of which `value(i)` is entry i.
template <class T, class F> __device__ std::uint32_t pack_word(int word, const F& value) {
    if constexpr (std::is_same_v<T, float>) {
        return bits_of(value(word));
    } else {
        return pack<T>(value(2 * word), value(2 * word + 1));
    }
}

// A float as the sum of two TF32 numbers, the first to nearest. The second is not rounded, which could make
// a number of what is none: the tensor cores' own truncation loses at most 2^-23 of x. Infinity, and what
// rounds to it, becomes not a number.
struct Tf32Pieces {
    std::uint32_t large, small;
};
__device__ inline Tf32Pieces split_to_tf32(std::uint32_t x) {
    constexpr std::uint32_t kDropped = 13;  // bits of 23
    const std::uint32_t large = (x + (1u << (kDropped - 1))) >> kDropped << kDropped;
    return {large, bits_of(std::bit_cast<float>(x) - std::bit_cast<float>(large))};
}

// In float32, of 8 terms: the three larger of the four products of pieces, small ones first. At most 2^-21 of
// a term is lost. Tensor cores round toward zero, which adds up along a sum: this one leaves them each time.
template <>
__device__ inline void multiply_add<float>(float (&sums)[4], const Words4& a, std::uint32_t b0,
                                           std::uint32_t b1) {
    Words4 large, small;
    LRC_UNROLL
    for (int i = 0; i < 4; ++i) {
        const Tf32Pieces pieces = split_to_tf32(a.word[i]);
        large.word[i] = pieces.large;
        small.word[i] = pieces.small;
    }
    const Tf32Pieces first = split_to_tf32(b0), second = split_to_tf32(b1);
    float products[4] = {};
    multiply_add_tf32(products, small, first.large, second.large);
    multiply_add_tf32(products, large, first.small, second.small);
    multiply_add_tf32(products, large, first.large, second.large);
    LRC_UNROLL
    for (int i = 0; i < 4; ++i) sums[i] += products[i];
}

}  // namespace lrc

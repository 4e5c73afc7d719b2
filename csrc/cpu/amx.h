// The instructions of AMX on bfloat16, a function each. What uses them takes them as a type, `Tiles`: the
// tests put one in its place that computes the same without such a processor
// (tests/csrc/emulation/host_tiles.h). Source: Intel, Software Developer's Manual, volume 1, chapter 18.
#pragma once

#include <cstdint>

#include "device.h"
#include "math/floats.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define LRC_WITH_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lrc {

// What ldtilecfg reads: palette 1 is eight tiles of up to 16 rows of 64 bytes.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

#ifdef LRC_WITH_AMX

// Whether this processor has these instructions and Linux lets this process use them, for which a process has
// to ask once: a thread's state grows by 8 KiB.
inline bool has_amx() {
    constexpr long kRequestPermission = 0x1023;
    constexpr long kTileData = 18;
    static const bool has = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                            syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return has;
}

// Not the compiler's intrinsics: those of GCC are macros, which want a tile's number as a literal, and do not
// say that they read and write memory.
struct AmxTiles {
    // Zeroes all tiles. Their state is this thread's, and is to be released.
    LRC_INLINE void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
    LRC_INLINE void release() { asm volatile("tilerelease"); }
    template <int kTile> LRC_INLINE void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(kTile)); }
    template <int kTile> LRC_INLINE void load(const Bfloat16* from, std::int64_t stride) {  // in bytes
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
    }
    template <int kTile> LRC_INLINE void store(float* to, std::int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
    }
    // c[m, n] += sum_k a[m, 2 k] b[k, 2 n] + a[m, 2 k + 1] b[k, 2 n + 1]
    template <int kC, int kA, int kB> LRC_INLINE void multiply() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
    }
};

#else

inline bool has_amx() { return false; }

#endif

}  // namespace lrc

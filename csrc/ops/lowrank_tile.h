// How the CUDA twin of lowrank_conv2d cuts its work: a pure function of sizes, so that callers can ask before
// they call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device.h"

namespace lrc {

inline constexpr int kTileBytes = 64;         // of the terms staged at once: two steps of the tensor cores
inline constexpr int kTileStages = 3;         // chunks in flight
inline constexpr int kTilePaddingBytes = 16;  // eight rows of ldmatrix fall on different banks
inline constexpr int kTileStrideBytes = kTileBytes + kTilePaddingBytes;
inline constexpr int kOriginBytes = 16;  // where the window of a pixel lies

// A block's share of either product. Zero pixels: the op does not fit the device.
struct LowrankTile {
    int pixels;
    int columns;  // of z, then of the output, at once
    std::int64_t shared_bytes;
};

// Of a row of z in shared memory.
constexpr std::int64_t hidden_bytes(std::int64_t inner, std::int64_t entry_bytes) {
    return (inner * entry_bytes + kTileBytes - 1) / kTileBytes * kTileBytes + kTilePaddingBytes;
}

constexpr LowrankTile make_tile(int pixels, int columns, std::int64_t inner, std::int64_t entry_bytes) {
    const std::int64_t staged = kTileStages * (pixels + columns) * kTileStrideBytes;
    return {pixels, columns, pixels * (kOriginBytes + hidden_bytes(inner, entry_bytes)) + staged};
}

// The largest of three tiles that leaves no multiprocessor idle; of 128 pixels, the wider one where a group's
// rank fills it. z of all groups stays in shared memory, so many groups of high rank need few pixels.
constexpr LowrankTile choose_tile(std::int64_t pixels,          // of all images
                                  std::int64_t groups,          //
                                  std::int64_t rank,            // of a group
                                  std::int64_t entry_bytes,     // 4 of float32, 2 of the 16-bit types
                                  std::int64_t shared_limit,    // bytes a block can have
                                  std::int64_t multiprocessors  // of the device
) {
    const std::int64_t inner = groups * rank;
    const LowrankTile large = make_tile(128, rank > 64 ? 128 : 64, inner, entry_bytes);
    const LowrankTile small = make_tile(64, 64, inner, entry_bytes);
    if (pixels > 64 * multiprocessors && large.shared_bytes <= shared_limit) return large;
    if (small.shared_bytes <= shared_limit) return small;
    return {0, 0, small.shared_bytes};
}

}  // namespace lrc

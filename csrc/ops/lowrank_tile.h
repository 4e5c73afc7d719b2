// How the CUDA twin of lowrank_conv2d cuts its work: a pure function of sizes, so that callers can ask before
// they call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device.h"

namespace lrc {

inline constexpr int kTileTerms = 32;   // of a sum, staged at once: two steps of the tensor cores
inline constexpr int kTileStages = 3;   // chunks in flight
inline constexpr int kTilePadding = 8;  // 16-bit entries: eight rows of ldmatrix fall on different banks
inline constexpr int kTileStride = kTileTerms + kTilePadding;
inline constexpr int kOriginBytes = 16;  // where the window of a pixel lies

// A block's share of either product. Zero pixels: the op does not fit the device.
struct LowrankTile {
    int pixels;
    int columns;  // of z, then of the output, at once
    std::int64_t shared_bytes;
};

// Entries of a row of z in shared memory.
LRC_HOST_DEVICE constexpr std::int64_t hidden_stride(std::int64_t inner) {
    return (inner + kTileTerms - 1) / kTileTerms * kTileTerms + kTilePadding;
}

constexpr LowrankTile make_tile(int pixels, int columns, std::int64_t inner) {
    const std::int64_t staged = kTileStages * (pixels + columns) * kTileStride;
    return {pixels, columns, pixels * (kOriginBytes + 2 * hidden_stride(inner)) + 2 * staged};
}

// The largest of three tiles that leaves no multiprocessor idle; of 128 pixels, the wider one where a group's
// rank fills it. z of all groups stays in shared memory, so many groups of high rank need few pixels.
constexpr LowrankTile choose_tile(std::int64_t pixels,          // of all images
                                  std::int64_t groups,          //
                                  std::int64_t rank,            // of a group
                                  std::int64_t shared_limit,    // bytes a block can have
                                  std::int64_t multiprocessors  // of the device
) {
    const std::int64_t inner = groups * rank;
    const LowrankTile large = make_tile(128, rank > 64 ? 128 : 64, inner);
    const LowrankTile small = make_tile(64, 64, inner);
    if (pixels > 64 * multiprocessors && large.shared_bytes <= shared_limit) return large;
    if (small.shared_bytes <= shared_limit) return small;
    return {0, 0, small.shared_bytes};
}

}  // namespace lrc

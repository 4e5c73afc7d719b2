// Sums of vec(patch) vec(patch)^T over all patches of a batch of images, which no one stores.
#pragma once

#include <cstdint>

#include "device.h"
#include "math/floats.h"

namespace lrc {

// Axes: depth, rows, columns; the first ones may be of size 1. A pixel is a place of one image.

// A box of pixels q, `stride` apart.
struct PatchCell {
    std::int64_t start[3];
    std::int64_t count[3];  // >= 1
};

// Of kernel positions u <= v, row-major: block (u, v) of the result is the sum of P over these cells.
struct PatchWindow {
    std::int64_t u;
    std::int64_t v;
    std::int64_t first_part;
    std::int64_t end_part;
};

// Kernel positions at one distance, whose windows are unions of the same cells:
//     P(cell) = sum over images and q in the cell of x[q] x[q + distance]^T, [channels, channels] a group
// Both pixels are inside the image. Cells and windows begin where those of the offset before end. The
// distance is zero only for u == v, for every u.
struct PatchOffset {
    std::int64_t distance[3];  // pixels; its first entry that is not zero is positive
    std::int64_t first_cell;
    std::int64_t end_cell;
    std::int64_t first_window;
    std::int64_t end_window;
};

// products[g][(i, u)][(j, v)] += sum of patch[i, u] patch[j, v], both triangles, and sums[g][(i, u)] += sum
// of patch[i, u], for channel i and kernel position u, the latter fastest. Products are added in T over at
// most kPatchRun pixels, then in double, in an order that does not depend on `threads`.
template <class T> struct AutocorrelationArgs {
    const T* x;  // [batch, groups, channels, *sizes]
    std::int64_t batch;
    std::int64_t groups;
    std::int64_t channels;  // of a group
    std::int64_t sizes[3];
    std::int64_t strides[6];  // of x, entries
    std::int64_t step[3];     // pixels between neighbours of a cell
    std::int64_t area;        // kernel positions
    const PatchOffset* offsets;
    std::int64_t offset_count;
    const PatchCell* cells;
    const PatchWindow* windows;
    const std::int64_t* parts;  // indices of cells
    double* products;           // [groups, channels * area, channels * area]
    double* sums;               // [groups, channels * area]
    int threads;                // of the CPU twin
};

inline constexpr std::int64_t kPatchRun = 192;

// For T = float and double.
template <class T> void autocorrelation(Cpu device, const AutocorrelationArgs<T>& args);

// What the CUDA twin adds at once: the windows of neighbouring offsets, and their cells.
struct PatchRound {
    std::int64_t first_cell;
    std::int64_t end_cell;
    std::int64_t first_window;
    std::int64_t end_window;
    std::int64_t splits;  // shares of the pixels of a cell, added in ascending order
    double* workspace;    // [splits, cells, groups, channels, channels]
};

// The products of one round; not the sums. The tables lie on the device. For T = float, Bfloat16 and Half:
// the products of two T are exact to 2^-24 of themselves, and added in float32 over at most kPatchRun pixels.
template <class T>
void autocorrelation(Cuda device, const AutocorrelationArgs<T>& args, const PatchRound& round);

}  // namespace lrc

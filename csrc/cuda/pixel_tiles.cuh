// What a block of lowrank_conv2d works on: its tile of pixels and columns, the order of its steps, and how
// their terms come to shared memory.
#pragma once

#include <cuda_runtime.h>

#include "cuda/block.cuh"
#include "cuda/ptx.cuh"
#include "ops/lowrank_conv2d.h"

namespace lrc::pixel_tiles {

// Entries of a staged row: those that are terms, and the distance of the next row.
template <class T> inline constexpr int kTileTerms = kTileBytes / sizeof(T);
template <class T> inline constexpr int kTileStride = kTileStrideBytes / sizeof(T);

template <class T> struct Problem {
    const T* input;
    const T* encoder;
    const T* decoder;
    const T* bias;
    T* out;
    std::int64_t pixels;  // of all images
    int image_rows, image_columns, channels;
    int out_rows, out_columns, filters;
    int kernel_columns;
    int row_stride, row_padding, row_dilation;
    int column_stride, column_padding, column_dilation;
    int inside, groups, rank;
    int terms;          // inside * taps
    int inner;          // groups * rank
    int hidden_stride;  // of a row of z
    Activation activation;
    bool wide_input, wide_encoder, wide_decoder, wide_out;  // 16 bytes at a time
};

// kRowWarps * kColumnWarps warps, each of 32 pixels and kWarpColumns columns.
template <int kRowWarps_, int kColumnWarps_, int kWarpColumns_> struct Shape {
    static constexpr int kColumnWarps = kColumnWarps_;
    static constexpr int kWarpPixels = 32;
    static constexpr int kWarpColumns = kWarpColumns_;
    static constexpr int kPixels = kRowWarps_ * kWarpPixels;
    static constexpr int kColumns = kColumnWarps * kWarpColumns;
    static constexpr int kThreads = kRowWarps_ * kColumnWarps * kWarpSize;
    static constexpr int kOutStride = kWarpColumns + 4;  // floats, aligned to 16 bytes
    static constexpr int kWarpOut = 8 * kOutStride;      // staged by a warp at once
    static_assert(kWarpOut * sizeof(float) * kThreads / kWarpSize <= kTileStages * kPixels * kTileStrideBytes,
                  "the results of a tile take the place of staged pixels");
};

// Of a warp's tile: 16 x 8 entries a time, as multiply_add lays them out.
template <class S> using Sums = float[S::kWarpPixels / 16][S::kWarpColumns / 8][4];

// The top left corner of a pixel's window; a negative image where there is no pixel.
struct Origin {
    std::int64_t image;  // its first entry
    int row, column;
};
static_assert(sizeof(Origin) == kOriginBytes);

template <class T> struct Shared {
    Origin* origins;  // [pixels]
    T* pixels;        // [kTileStages, pixels, kTileStride]
    T* columns;       // [kTileStages, columns, kTileStride]
    T* hidden;        // z [pixels, hidden_stride]
};

template <class S, class T> __device__ Shared<T> carve_shared() {
    Origin* origins = dynamic_shared<Origin>();
    T* pixels = reinterpret_cast<T*>(origins + S::kPixels);
    T* columns = pixels + kTileStages * S::kPixels * kTileStride<T>;
    return {origins, pixels, columns, columns + kTileStages * S::kColumns * kTileStride<T>};
}

// A chunk of the terms of a tile of columns. The part after the last group is the decoder.
struct Step {
    int part, tile, chunk;
};

template <class S, class T> struct Steps {
    const Problem<T>& problem;

    // At least one: a sum of no terms is zero, and must be written.
    __device__ int chunks(int part) const {
        const int terms = part == problem.groups ? problem.inner : problem.terms;
        return terms == 0 ? 1 : (terms + kTileTerms<T> - 1) / kTileTerms<T>;
    }
    __device__ int width(int part) const { return part == problem.groups ? problem.filters : problem.rank; }
    __device__ Step first() const { return {problem.rank == 0 ? problem.groups : 0, 0, 0}; }
    __device__ bool ended(const Step& step) const { return step.part > problem.groups; }
    __device__ bool ends_tile(const Step& step) const { return step.chunk + 1 == chunks(step.part); }
    __device__ void advance(Step& step) const {
        if (ended(step)) return;
        if (!ends_tile(step)) {
            ++step.chunk;
            return;
        }
        step.chunk = 0;
        ++step.tile;
        if (step.tile * S::kColumns < width(step.part)) return;
        step.tile = 0;
        ++step.part;
    }
};

template <class S, class T> __device__ void find_origins(const Problem<T>& problem, Origin* origins) {
    const int i = threadIdx.x;
    if (i >= S::kPixels) return;
    const std::int64_t pixel = static_cast<std::int64_t>(blockIdx.x) * S::kPixels + i;
    if (pixel >= problem.pixels) {
        origins[i] = {-1, 0, 0};
        return;
    }
    const std::int64_t row_of_any = pixel / problem.out_columns;
    const std::int64_t image = row_of_any / problem.out_rows;
    const int row = static_cast<int>(row_of_any - image * problem.out_rows);
    const int column = static_cast<int>(pixel - row_of_any * problem.out_columns);
    origins[i] = {image * problem.image_rows * problem.image_columns * problem.channels,
                  row * problem.row_stride - problem.row_padding,
                  column * problem.column_stride - problem.column_padding};
}

// One entry, or 16 bytes of them in flight; zeros where `from` may not be read.
template <int kWidth, class T> __device__ void copy(T* to, const T* from, bool readable) {
    if constexpr (kWidth == 1) {
        *to = readable ? *from : T{};
    } else {
        copy_async(to, from, readable);
    }
}

template <class S, int kWidth, class T>
__device__ void stage_pixels(const Problem<T>& problem, const Origin* origins, const Step& step,
                             T* to) {  // [kPixels, kTileStride]
    constexpr int kAcross = kTileTerms<T> / kWidth;
    const int at = static_cast<int>(threadIdx.x) % kAcross * kWidth;
    const int term = step.chunk * kTileTerms<T> + at;
    const bool any = term < problem.terms;
    const unsigned tap = any ? static_cast<unsigned>(term) / static_cast<unsigned>(problem.inside) : 0;
    const int channel = term - static_cast<int>(tap) * problem.inside + step.part * problem.inside;
    const auto tap_row = static_cast<int>(tap / static_cast<unsigned>(problem.kernel_columns));
    const int tap_column = static_cast<int>(tap) - tap_row * problem.kernel_columns;
    for (int i = threadIdx.x / kAcross; i < S::kPixels; i += S::kThreads / kAcross) {
        const Origin origin = origins[i];
        const int row = origin.row + tap_row * problem.row_dilation;
        const int column = origin.column + tap_column * problem.column_dilation;
        const bool readable = any && origin.image >= 0 && row >= 0 && row < problem.image_rows &&
                              column >= 0 && column < problem.image_columns;
        const std::int64_t pixel = static_cast<std::int64_t>(row) * problem.image_columns + column;
        const T* from = problem.input + (readable ? origin.image + pixel * problem.channels + channel : 0);
        copy<kWidth>(to + i * kTileStride<T> + at, from, readable);
    }
}

template <class S, int kWidth, class T>
__device__ void stage_columns(const T* weight,  // [columns, terms], the tile's first column
                              int columns, int terms, int chunk,
                              T* to) {  // [kColumns, kTileStride]
    constexpr int kAcross = kTileTerms<T> / kWidth;
    const int at = static_cast<int>(threadIdx.x) % kAcross * kWidth;
    const int term = chunk * kTileTerms<T> + at;
    for (int i = threadIdx.x / kAcross; i < S::kColumns; i += S::kThreads / kAcross) {
        const bool readable = i < columns && term < terms;
        const T* from = weight + (readable ? static_cast<std::int64_t>(i) * terms + term : 0);
        copy<kWidth>(to + i * kTileStride<T> + at, from, readable);
    }
}

// Begins to copy a chunk into one of the stages.
template <class S, class T>
__device__ void stage(const Problem<T>& problem, const Shared<T>& shared, const Step& step, int slot) {
    T* pixels = shared.pixels + slot * S::kPixels * kTileStride<T>;
    T* columns = shared.columns + slot * S::kColumns * kTileStride<T>;
    const int column = step.tile * S::kColumns;
    const auto choose = [&](bool wide, const T* weight, int rows, int terms) {
        if (wide) {
            stage_columns<S, kWideEntries<T>>(weight, rows, terms, step.chunk, columns);
        } else {
            stage_columns<S, 1>(weight, rows, terms, step.chunk, columns);
        }
    };
    if (step.part == problem.groups) {
        const T* weight = problem.decoder + static_cast<std::int64_t>(column) * problem.inner;
        return choose(problem.wide_decoder, weight, problem.filters - column, problem.inner);
    }
    const std::int64_t row = static_cast<std::int64_t>(step.part) * problem.rank + column;
    choose(problem.wide_encoder, problem.encoder + row * problem.terms, problem.rank - column, problem.terms);
    if (problem.wide_input) {
        stage_pixels<S, kWideEntries<T>>(problem, shared.origins, step, pixels);
    } else {
        stage_pixels<S, 1>(problem, shared.origins, step, pixels);
    }
}

}  // namespace lrc::pixel_tiles

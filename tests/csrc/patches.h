// What the tests of both twins of autocorrelation share: geometries and their tables.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "ops/autocorrelation.h"

namespace patches {

struct Shape {
    std::int64_t batch, groups, channels, rows, columns, kernel, stride, padding;
    std::int64_t out(std::int64_t size) const { return (size + 2 * padding - kernel) / stride + 1; }
};

struct Tables {
    std::vector<lrc::PatchOffset> offsets;
    std::vector<lrc::PatchCell> cells;
    std::vector<lrc::PatchWindow> windows;
    std::vector<std::int64_t> parts;
};

// First pixel and number of places at which both kernel positions of an axis are inside the image.
struct Span {
    std::int64_t start, count;
};

inline Span span(const Shape& shape, std::int64_t size, std::int64_t u, std::int64_t v) {
    Span found{0, 0};
    for (std::int64_t place = 0; place < shape.out(size); ++place) {
        const std::int64_t low = place * shape.stride - shape.padding + std::min(u, v);
        const std::int64_t high = place * shape.stride - shape.padding + std::max(u, v);
        if (low < 0 || high >= size) continue;
        if (found.count++ == 0) found.start = place * shape.stride - shape.padding + u;
    }
    return found;
}

// Every pair of kernel positions is an offset of its own; its window is cut between the first row and the
// others.
inline Tables make_tables(const Shape& shape) {
    Tables tables;
    const std::int64_t area = shape.kernel * shape.kernel;
    for (std::int64_t u = 0; u < area; ++u) {
        for (std::int64_t v = u; v < area; ++v) {
            const std::int64_t u_row = u / shape.kernel, u_column = u % shape.kernel;
            const std::int64_t v_row = v / shape.kernel, v_column = v % shape.kernel;
            const Span rows = span(shape, shape.rows, u_row, v_row);
            const Span columns = span(shape, shape.columns, u_column, v_column);
            const auto first_cell = static_cast<std::int64_t>(tables.cells.size());
            if (rows.count > 0 && columns.count > 0) {
                tables.cells.push_back({{0, rows.start, columns.start}, {1, 1, columns.count}});
                if (rows.count > 1)
                    tables.cells.push_back(
                        {{0, rows.start + shape.stride, columns.start}, {1, rows.count - 1, columns.count}});
            }
            const auto end_cell = static_cast<std::int64_t>(tables.cells.size());
            const auto first_part = static_cast<std::int64_t>(tables.parts.size());
            for (std::int64_t cell = first_cell; cell < end_cell; ++cell) tables.parts.push_back(cell);
            const auto window = static_cast<std::int64_t>(tables.windows.size());
            tables.windows.push_back({u, v, first_part, first_part + end_cell - first_cell});
            tables.offsets.push_back(
                {{0, v_row - u_row, v_column - u_column}, first_cell, end_cell, window, window + 1});
        }
    }
    return tables;
}

// Entry `d` = (channel, row, column) of the patch at a place of an image.
template <class T>
T entry(const lrc::AutocorrelationArgs<T>& args, const Shape& shape, std::int64_t image, std::int64_t group,
        std::int64_t row, std::int64_t column, std::int64_t d) {
    const std::int64_t y = row * shape.stride - shape.padding + d % args.area / shape.kernel;
    const std::int64_t x = column * shape.stride - shape.padding + d % shape.kernel;
    if (y < 0 || y >= shape.rows || x < 0 || x >= shape.columns) return {};
    return args.x[image * args.strides[0] + group * args.strides[1] + d / args.area * args.strides[2] +
                  y * args.strides[4] + x * args.strides[5]];
}

// Without results: those are the test's. x is NCHW or channels_last.
template <class T>
lrc::AutocorrelationArgs<T> arguments(const Shape& shape, const Tables& tables, const std::vector<T>& x,
                                      bool channels_last) {
    const std::int64_t image = shape.rows * shape.columns, all = shape.groups * shape.channels;
    lrc::AutocorrelationArgs<T> args{
        .x = x.data(),
        .batch = shape.batch,
        .groups = shape.groups,
        .channels = shape.channels,
        .sizes = {1, shape.rows, shape.columns},
        .strides = {all * image, shape.channels * image, image, 0, shape.columns, 1},
        .step = {1, shape.stride, shape.stride},
        .area = shape.kernel * shape.kernel,
        .offsets = tables.offsets.data(),
        .offset_count = static_cast<std::int64_t>(tables.offsets.size()),
        .cells = tables.cells.data(),
        .windows = tables.windows.data(),
        .parts = tables.parts.data(),
        .products = nullptr,
        .sums = nullptr,
        .threads = 1};
    if (channels_last) {
        const std::int64_t strides[] = {all * image, shape.channels, 1, 0, shape.columns * all, all};
        std::copy_n(strides, 6, args.strides);
    }
    return args;
}

}  // namespace patches

#include "ops/lowrank_conv2d.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd.h"

// A task is some output rows of one image. Their z stays in the cache: it is made a group at a time by direct
// convolution, from a copy of the group's input rows that has the zeros around them, and is then multiplied
// by U. Vectors run along the columns of the image. A stride over columns is taken out by the copy, which
// puts the columns of one remainder next to each other, so the loop over the taps only adds offsets.

namespace lrc {
namespace {

constexpr std::int64_t kWide = 8;     // floats of a vector
constexpr std::int64_t kPixels = 16;  // of the decoder's kernel: with kFilters it fills the registers of AVX2
constexpr std::int64_t kFilters = 6;  // rows of U of the decoder's kernel
constexpr std::int64_t kRanks = 4;    // at most, of the encoder's kernel
constexpr std::int64_t kMaxVectors = 8;      // at most, of the encoder's kernel
constexpr std::int64_t kTileSize = 1 << 15;  // floats of z: a quarter of an L2 cache of 512 KiB

typedef float Wide __attribute__((vector_size(32), may_alias));
typedef float LooseWide __attribute__((vector_size(32), aligned(4), may_alias));

LRC_INLINE Wide load_wide(const float* p) { return *reinterpret_cast<const LooseWide*>(p); }
LRC_INLINE void store_wide(float* p, Wide x) { *reinterpret_cast<LooseWide*>(p) = x; }

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Cuts `size` into the fewest parts of at most `most`, as even as can be: part `index` begins here.
LRC_INLINE std::int64_t cut(std::int64_t size, std::int64_t most, std::int64_t index) {
    const std::int64_t parts = divide_up(size, most);
    return size / parts * index + std::min(index, size % parts);
}

// How a tile lies in its scratch, the same for all tiles.
struct Layout {
    std::int64_t tile_rows;             // of the output
    std::int64_t tiles;                 // of an image
    std::int64_t phase_size;            // columns of one remainder modulo the stride
    std::int64_t row_size;              // of the copy: all remainders
    std::int64_t plane_size;            // of the copy: one input channel
    std::int64_t z_stride;              // between the rows of z
    std::vector<std::int64_t> taps;     // [channels / groups * kernel area] offsets in the copy
    std::vector<std::int64_t> sources;  // [vectors, rounded up] offsets of z's vectors in the copy
    std::vector<std::int64_t> targets;  // the same in a row of z, ascending
};

std::int64_t choose_tile_rows(const LowrankConv2dArgs& args) {
    const std::int64_t row = std::max<std::int64_t>(args.groups * args.rank * args.columns.out, 1);
    const std::int64_t fit = std::clamp<std::int64_t>(kTileSize / row, 1, args.rows.out);
    // A small batch is cut finer, so that every thread has a part.
    const std::int64_t wanted = std::min(divide_up(std::max(args.threads, 1), args.batch), args.rows.out);
    return divide_up(args.rows.out, std::max(divide_up(args.rows.out, fit), wanted));
}

Layout make_layout(const LowrankConv2dArgs& args) {
    const ConvAxis& rows = args.rows;
    const ConvAxis& columns = args.columns;
    Layout layout{};
    layout.tile_rows = choose_tile_rows(args);
    layout.tiles = divide_up(rows.out, layout.tile_rows);
    const std::int64_t row_vectors = divide_up(columns.out, kWide);
    const std::int64_t last_tap = (columns.kernel - 1) * columns.dilation;
    layout.phase_size = row_vectors * kWide + last_tap / columns.stride;
    layout.row_size = layout.phase_size * std::min(columns.stride, last_tap + 1);
    layout.plane_size =
        layout.row_size * ((layout.tile_rows - 1) * rows.stride + (rows.kernel - 1) * rows.dilation + 1);
    // An odd number of cache lines, so that the rows of z fall into different sets of the L1 cache.
    const std::int64_t lines = divide_up(layout.tile_rows * columns.out + kWide, 16);
    layout.z_stride = 16 * (lines + 1 - lines % 2);
    for (std::int64_t i = 0; i < args.channels / args.groups; ++i) {
        for (std::int64_t a = 0; a < rows.kernel; ++a) {
            for (std::int64_t b = 0; b < columns.kernel; ++b) {
                const std::int64_t column = b * columns.dilation;
                layout.taps.push_back(i * layout.plane_size + a * rows.dilation * layout.row_size +
                                      column % columns.stride * layout.phase_size + column / columns.stride);
            }
        }
    }
    for (std::int64_t row = 0; row < layout.tile_rows; ++row) {
        for (std::int64_t v = 0; v < row_vectors; ++v) {
            layout.sources.push_back(row * rows.stride * layout.row_size + v * kWide);
            layout.targets.push_back(row * columns.out + v * kWide);
        }
    }
    // The kernel takes some vectors at a time: the last may come again.
    for (std::int64_t i = 1; i < kMaxVectors; ++i) {
        layout.sources.push_back(layout.sources.back());
        layout.targets.push_back(layout.targets.back());
    }
    return layout;
}

// Columns `phase`, `phase` + stride, ... of one padded row of the input.
LRC_INLINE void copy_phase(const float* from, const ConvAxis& axis, std::int64_t phase, std::int64_t size,
                           float* to) {
    const std::int64_t first = phase - axis.padding;  // column of `from` that goes to to[0]
    const std::int64_t before = first >= 0 ? 0 : std::min(divide_up(-first, axis.stride), size);
    const std::int64_t inside = first >= axis.in ? 0 : divide_up(axis.in - first, axis.stride);
    const std::int64_t end = std::clamp(inside, before, size);
    std::fill(to, to + before, 0.0F);
    if (axis.stride == 1) {
        for (std::int64_t q = before; q < end; ++q) to[q] = from[first + q];
    } else if (axis.stride == 2) {
        for (std::int64_t q = before; q < end; ++q) to[q] = from[first + 2 * q];
    } else {
        for (std::int64_t q = before; q < end; ++q) to[q] = from[first + axis.stride * q];
    }
    std::fill(to + end, to + size, 0.0F);
}

// The rows of one channel that `count` output rows from `row` on read.
LRC_INLINE void copy_plane(const float* plane, const LowrankConv2dArgs& args, const Layout& layout,
                           std::int64_t row, std::int64_t count, float* to) {
    const ConvAxis& rows = args.rows;
    const std::int64_t first = row * rows.stride - rows.padding;
    const std::int64_t needed = (count - 1) * rows.stride + (rows.kernel - 1) * rows.dilation + 1;
    for (std::int64_t i = 0; i < needed; ++i, to += layout.row_size) {
        if (first + i < 0 || first + i >= rows.in) {
            std::fill(to, to + layout.row_size, 0.0F);
            continue;
        }
        const float* from = plane + (first + i) * args.columns.in;
        for (std::int64_t phase = 0; phase * layout.phase_size < layout.row_size; ++phase) {
            copy_phase(from, args.columns, phase, layout.phase_size, to + phase * layout.phase_size);
        }
    }
}

// kCount vectors of kRank rows of z from one group: each vector that is loaded serves all the ranks.
template <int kRank, int kCount>
LRC_INLINE void encode(const float* copy, const float* weights, const Layout& layout, std::int64_t vectors,
                       float* z) {
    const auto terms = static_cast<std::int64_t>(layout.taps.size());
    const std::int64_t* taps = layout.taps.data();
    for (std::int64_t v = 0; v < vectors; v += kCount) {
        const float* from[kCount];
        LRC_UNROLL
        for (int c = 0; c < kCount; ++c) from[c] = copy + layout.sources[v + c];
        Wide sums[kRank][kCount] = {};
        for (std::int64_t m = 0; m < terms; ++m) {
            LRC_UNROLL
            for (int c = 0; c < kCount; ++c) {
                const Wide x = load_wide(from[c] + taps[m]);
                LRC_UNROLL
                for (int r = 0; r < kRank; ++r) sums[r][c] += weights[r * terms + m] * x;
            }
        }
        // In ascending order: what a row's last vector holds too much, the next row replaces.
        LRC_UNROLL
        for (int c = 0; c < kCount; ++c) {
            LRC_UNROLL
            for (int r = 0; r < kRank; ++r)
                store_wide(z + r * layout.z_stride + layout.targets[v + c], sums[r][c]);
        }
    }
}

// All rows of z of one group.
LRC_INLINE void encode_group(const float* copy, const float* weights, std::int64_t rank, const Layout& layout,
                             std::int64_t vectors, float* z) {
    const auto terms = static_cast<std::int64_t>(layout.taps.size());
    for (std::int64_t part = 0; part < divide_up(rank, kRanks); ++part) {
        const std::int64_t first = cut(rank, kRanks, part);
        const float* rows = weights + first * terms;
        float* to = z + first * layout.z_stride;
        switch (cut(rank, kRanks, part + 1) - first) {
            case 1:
                encode<1, 8>(copy, rows, layout, vectors, to);
                break;
            case 2:
                encode<2, 4>(copy, rows, layout, vectors, to);
                break;
            case 3:
                encode<3, 4>(copy, rows, layout, vectors, to);
                break;
            default:
                encode<4, 2>(copy, rows, layout, vectors, to);
        }
    }
}

// kRows filters and kPixels pixels of the output, of which `width` exist.
template <int kRows>
LRC_INLINE void decode(const float* weights, const float* bias, const float* z, std::int64_t z_stride,
                       std::int64_t terms, float* out, std::int64_t out_stride, std::int64_t width) {
    constexpr int kVectors = kPixels / kWide;
    Wide sums[kRows][kVectors];
    LRC_UNROLL
    for (int i = 0; i < kRows; ++i) {
        LRC_UNROLL
        for (int v = 0; v < kVectors; ++v) sums[i][v] = Wide{} + (bias == nullptr ? 0.0F : bias[i]);
    }
    for (std::int64_t m = 0; m < terms; ++m, z += z_stride) {
        const Wide low = load_wide(z), high = load_wide(z + kWide);
        LRC_UNROLL
        for (int i = 0; i < kRows; ++i) {
            sums[i][0] += weights[i * terms + m] * low;
            sums[i][1] += weights[i * terms + m] * high;
        }
    }
    if (width == kPixels) {
        LRC_UNROLL
        for (int i = 0; i < kRows; ++i) {
            store_wide(out + i * out_stride, sums[i][0]);
            store_wide(out + i * out_stride + kWide, sums[i][1]);
        }
        return;
    }
    for (int i = 0; i < kRows; ++i) {
        std::copy_n(reinterpret_cast<const float*>(sums[i]), width, out + i * out_stride);
    }
}

// All filters of a tile of `pixels` pixels; `out` is its first pixel of the first filter.
LRC_INLINE void decode_tile(const LowrankConv2dArgs& args, const Layout& layout, const float* z,
                            std::int64_t pixels, float* out) {
    const std::int64_t terms = args.groups * args.rank;
    const std::int64_t plane = args.rows.out * args.columns.out;
    for (std::int64_t pixel = 0; pixel < pixels; pixel += kPixels) {
        const std::int64_t width = std::min(kPixels, pixels - pixel);
        for (std::int64_t part = 0; part < divide_up(args.filters, kFilters); ++part) {
            const std::int64_t first = cut(args.filters, kFilters, part);
            const float* weights = args.decoder + first * terms;
            const float* bias = args.bias == nullptr ? nullptr : args.bias + first;
            float* to = out + first * plane + pixel;
            const std::int64_t z_stride = layout.z_stride;
            const float* from = z + pixel;
            switch (cut(args.filters, kFilters, part + 1) - first) {
                case 1:
                    decode<1>(weights, bias, from, z_stride, terms, to, plane, width);
                    break;
                case 2:
                    decode<2>(weights, bias, from, z_stride, terms, to, plane, width);
                    break;
                case 3:
                    decode<3>(weights, bias, from, z_stride, terms, to, plane, width);
                    break;
                case 4:
                    decode<4>(weights, bias, from, z_stride, terms, to, plane, width);
                    break;
                case 5:
                    decode<5>(weights, bias, from, z_stride, terms, to, plane, width);
                    break;
                default:
                    decode<6>(weights, bias, from, z_stride, terms, to, plane, width);
            }
        }
    }
}

LRC_MULTIVERSION void run(const LowrankConv2dArgs& args, const Layout& layout, std::int64_t task,
                          float* scratch) {
    const std::int64_t image = task / layout.tiles;
    const std::int64_t row = task % layout.tiles * layout.tile_rows;
    const std::int64_t count = std::min(layout.tile_rows, args.rows.out - row);
    const std::int64_t vectors = count * divide_up(args.columns.out, kWide);
    const std::int64_t inside = args.channels / args.groups;
    const std::int64_t plane = args.rows.in * args.columns.in;
    const auto terms = static_cast<std::int64_t>(layout.taps.size());
    float* z = scratch;
    float* copy = scratch + args.groups * args.rank * layout.z_stride;
    for (std::int64_t group = 0; group < args.groups; ++group) {
        for (std::int64_t i = 0; i < inside; ++i) {
            const float* from = args.input + (image * args.channels + group * inside + i) * plane;
            copy_plane(from, args, layout, row, count, copy + i * layout.plane_size);
        }
        encode_group(copy, args.encoder + group * args.rank * terms, args.rank, layout, vectors,
                     z + group * args.rank * layout.z_stride);
    }
    float* out = args.out + image * args.filters * args.rows.out * args.columns.out + row * args.columns.out;
    decode_tile(args, layout, z, count * args.columns.out, out);
}

struct Free {
    void operator()(float* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<float, Free>;

Scratch make_scratch(const LowrankConv2dArgs& args, const Layout& layout) {
    const std::int64_t size =
        args.groups * args.rank * layout.z_stride + args.channels / args.groups * layout.plane_size;
    void* p = std::aligned_alloc(64, divide_up(size * sizeof(float), 64) * 64);
    if (p == nullptr) throw std::bad_alloc();
    return Scratch(static_cast<float*>(p));
}

}  // namespace

void lowrank_conv2d(Cpu, const LowrankConv2dArgs& args) {
    if (args.batch * args.filters * args.rows.out * args.columns.out == 0) return;
    const Layout layout = make_layout(args);
    const std::int64_t tasks = args.batch * layout.tiles;
    std::vector<Scratch> scratch;
    for (int worker = 0; worker < worker_count(args.threads, tasks); ++worker)
        scratch.push_back(make_scratch(args, layout));
    parallel_for(args.threads, tasks, [&](int worker, std::int64_t task) noexcept {
        run(args, layout, task, scratch[worker].get());
    });
}

}  // namespace lrc

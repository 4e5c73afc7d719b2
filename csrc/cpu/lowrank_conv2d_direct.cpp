#include "cpu/lowrank_conv2d_direct.h"

#include "cpu/simd.h"

// The kernel reads a copy of a group's input rows that has the zeros around them. A stride over columns is
// taken out by the copy, which puts the columns of one remainder next to each other, so the loop over the
// taps only adds offsets.

namespace lrc {
namespace {

// Whole vectors of zeros: up to kWide - 1 entries behind `end` are overwritten.
LRC_INLINE void clear(float* to, const float* end) {
    for (; to < end; to += kWide) store_wide(to, Wide{});
}

// Columns `phase`, `phase` + stride, ... of one padded row of the input. Like all writers of the copy it
// writes some entries too many, where what comes next in the plane is written later.
template <class T>
LRC_INLINE void copy_phase(const T* from, const ConvAxis& axis, std::int64_t phase, std::int64_t size,
                           float* to) {
    const Inside inside = find_inside(axis, phase, size);
    const std::int64_t count = inside.end - inside.begin;
    clear(to, to + inside.begin);
    float* begin = to + inside.begin;
    const std::int64_t first = inside.column;
    if (axis.stride == 1) {
        for (std::int64_t q = 0; q < count; ++q) begin[q] = to_float(from[first + q]);
    } else if (axis.stride == 2) {
        for (std::int64_t q = 0; q < count; ++q) begin[q] = to_float(from[first + 2 * q]);
    } else {
        for (std::int64_t q = 0; q < count; ++q) begin[q] = to_float(from[first + axis.stride * q]);
    }
    clear(to + inside.end, to + size);
}

// What copy_phase does, of `count` channels that lie side by side in each of `stored` channels' pixels; `to`
// is the first one's row. The last block of a row, or of the channels, moves back to be whole.
template <class T>
LRC_INLINE void copy_phase_last(const T* from, std::int64_t stored, std::int64_t count, const ConvAxis& axis,
                                std::int64_t phase, const DirectLayout& layout, bool clears, float* to) {
    const std::int64_t plane = layout.plane_size;
    const Inside inside = find_inside(axis, phase, layout.phase_size);
    for (std::int64_t c = 0; clears && c < count; ++c) clear(to + c * plane, to + c * plane + inside.begin);
    for (std::int64_t q = inside.begin; q < inside.end; q += kWide) {
        const std::int64_t begin = std::max(std::min(q, inside.end - kWide), inside.begin);
        const T* pixels = from + (inside.column + (begin - inside.begin) * axis.stride) * stored;
        for (std::int64_t i = 0; i < count; i += kWide) {
            const std::int64_t c = std::max<std::int64_t>(std::min(i, count - kWide), 0);
            // Strides of whole pixels are not foreseen by the processor.
            for (std::int64_t j = 0; j < kWide; ++j)
                __builtin_prefetch(pixels + c + (j + kWide) * axis.stride * stored);
            copy_block(pixels + c, axis.stride * stored, std::min(kWide, inside.end - begin),
                       std::min(kWide, count - c), plane, to + c * plane + begin);
        }
    }
    for (std::int64_t c = 0; clears && c < count; ++c)
        clear(to + c * plane + inside.end, to + c * plane + layout.phase_size);
}

// What a tile reads of `channels` channels from `channel` on. Without `clears` the zeros around it are there
// already.
template <class T>
LRC_INLINE void copy_input(const LowrankConv2dArgs<T>& args, const DirectLayout& layout,
                           const ImageTile& tile, std::int64_t channel, std::int64_t channels, bool clears,
                           float* to) {
    const ConvAxis& rows = args.rows;
    const T* input = args.input + tile.image * args.channels * rows.in * args.columns.in;
    const std::int64_t needed = (tile.rows - 1) * rows.stride + (rows.kernel - 1) * rows.dilation + 1;
    for (std::int64_t i = 0; i < needed; ++i, to += layout.row_size) {
        const std::int64_t from = tile.row * rows.stride - rows.padding + i;
        if (from < 0 || from >= rows.in) {
            for (std::int64_t c = 0; clears && c < channels; ++c)
                clear(to + c * layout.plane_size, to + c * layout.plane_size + layout.row_size);
            continue;
        }
        for (std::int64_t phase = 0; phase * layout.phase_size < layout.row_size; ++phase) {
            float* begin = to + phase * layout.phase_size;
            if (args.channels_last) {
                const T* pixels = input + from * args.columns.in * args.channels + channel;
                copy_phase_last(pixels, args.channels, channels, args.columns, phase, layout, clears, begin);
                continue;
            }
            for (std::int64_t c = 0; c < channels; ++c) {
                const T* line = input + ((channel + c) * rows.in + from) * args.columns.in;
                copy_phase(line, args.columns, phase, layout.phase_size, begin + c * layout.plane_size);
            }
        }
    }
}

constexpr int kRegisters = 16;               // of AVX2; AVX-512 has more
constexpr std::int64_t kVectors = 12;        // of a part of z: whole calls of the kernels
constexpr std::int64_t kCopySize = 1 << 12;  // floats: half an L1 cache of 32 KiB

// Vectors [begin, end) of kRank rows of z from one group, kCount at once: each vector that is loaded serves
// all the ranks.
template <int kWidth, int kRank, int kCount>
LRC_INLINE void encode(const float* copy, const float* weights, const DirectLayout& layout,
                       std::int64_t begin, std::int64_t end, Ahead& ahead, float* z) {
    const auto terms = static_cast<std::int64_t>(layout.taps.size());
    const std::int64_t* taps = layout.taps.data();
    for (std::int64_t v = begin; v < end; v += kCount) {
        ahead.fetch();
        const float* from[kCount];
        LRC_UNROLL
        for (int c = 0; c < kCount; ++c) from[c] = copy + layout.sources[v + c];
        Floats<kWidth> sums[kRank][kCount] = {};
        for (std::int64_t m = 0; m < terms; ++m) {
            // Either all that is loaded of x stays in registers beside the sums and a weight, or the weights.
            if constexpr (kRank * kCount + kCount < kRegisters) {
                Floats<kWidth> x[kCount];
                LRC_UNROLL
                for (int c = 0; c < kCount; ++c) x[c] = load_floats<kWidth>(from[c] + taps[m]);
                LRC_UNROLL
                for (int r = 0; r < kRank; ++r) {
                    LRC_UNROLL
                    for (int c = 0; c < kCount; ++c) sums[r][c] += weights[r * terms + m] * x[c];
                }
            } else {
                LRC_UNROLL
                for (int c = 0; c < kCount; ++c) {
                    const Floats<kWidth> x = load_floats<kWidth>(from[c] + taps[m]);
                    LRC_UNROLL
                    for (int r = 0; r < kRank; ++r) sums[r][c] += weights[r * terms + m] * x;
                }
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

// All rows of z of one group: 4 at once by 3 vectors, or 3 by 4 where that takes fewer calls of the kernel.
template <int kWidth>
LRC_INLINE void encode_rows(const float* copy, const float* weights, std::int64_t rank,
                            const DirectLayout& layout, std::int64_t vectors, Ahead& ahead, float* z) {
    const auto terms = static_cast<std::int64_t>(layout.taps.size());
    const std::int64_t most =
        divide_up(rank, 3) * divide_up(vectors, 4) < divide_up(rank, 4) * divide_up(vectors, 3) ? 3 : 4;
    // A copy that the L1 cache does not hold is gone through once, some vectors by all ranks at a time.
    const bool once = rank > most && layout.group_size > kCopySize;
    const std::int64_t size = once ? kVectors : vectors;
    for (std::int64_t begin = 0; begin < vectors; begin += size) {
        const std::int64_t end = std::min(begin + size, vectors);
        for (std::int64_t part = 0; part < divide_up(rank, most); ++part) {
            const std::int64_t first = cut(rank, most, part);
            const float* rows = weights + first * terms;
            float* to = z + first * layout.z_stride;
            switch (cut(rank, most, part + 1) - first) {
                case 1:
                    encode<kWidth, 1, 8>(copy, rows, layout, begin, end, ahead, to);
                    break;
                case 2:
                    encode<kWidth, 2, 4>(copy, rows, layout, begin, end, ahead, to);
                    break;
                case 3:
                    encode<kWidth, 3, 4>(copy, rows, layout, begin, end, ahead, to);
                    break;
                default:
                    encode<kWidth, 4, 3>(copy, rows, layout, begin, end, ahead, to);
            }
        }
    }
}

// Not inlined: the loops of the kernels need all registers.
LRC_MULTIVERSION void encode_group(Width<8>, const float* copy, const float* weights, std::int64_t rank,
                                   const DirectLayout& layout, std::int64_t vectors, Ahead& ahead, float* z) {
    encode_rows<8>(copy, weights, rank, layout, vectors, ahead, z);
}
LRC_AVX512 void encode_group(Width<16>, const float* copy, const float* weights, std::int64_t rank,
                             const DirectLayout& layout, std::int64_t vectors, Ahead& ahead, float* z) {
    encode_rows<16>(copy, weights, rank, layout, vectors, ahead, z);
}

// z of a tile.
template <int kWidth, class T>
LRC_INLINE Hidden encode_tile(const LowrankConv2dArgs<T>& args, const DirectLayout& layout,
                              const float* encoder, const ImageTile& tile, Ahead& ahead, float* scratch) {
    const std::int64_t inside = args.channels / args.groups;
    const auto taps = static_cast<std::int64_t>(layout.taps.size());
    const std::int64_t vectors = tile.rows * divide_up(args.columns.out, kWidth);
    float* copy = scratch + args.groups * args.rank * layout.z_stride;
    for (std::int64_t block = 0; block < args.groups; block += layout.group_block) {
        const std::int64_t end = std::min(block + layout.group_block, args.groups);
        const bool clears = block == 0 || !layout.keeps_zeros;
        copy_input(args, layout, tile, block * inside, (end - block) * inside, clears, copy);
        for (std::int64_t group = block; group < end; ++group) {
            encode_group(Width<kWidth>{}, copy + (group - block) * layout.group_size,
                         encoder + group * args.rank * taps, args.rank, layout, vectors, ahead,
                         scratch + group * args.rank * layout.z_stride);
        }
    }
    return {scratch, 1, layout.z_stride};
}

LRC_MULTIVERSION Hidden run(Width<8>, const LowrankConv2dArgs<float>& args, const DirectLayout& layout,
                            const float* encoder, const ImageTile& tile, Ahead& ahead, float* scratch) {
    return encode_tile<8>(args, layout, encoder, tile, ahead, scratch);
}
LRC_MULTIVERSION Hidden run(Width<8>, const LowrankConv2dArgs<Bfloat16>& args, const DirectLayout& layout,
                            const float* encoder, const ImageTile& tile, Ahead& ahead, float* scratch) {
    return encode_tile<8>(args, layout, encoder, tile, ahead, scratch);
}
LRC_AVX512 Hidden run(Width<16>, const LowrankConv2dArgs<float>& args, const DirectLayout& layout,
                      const float* encoder, const ImageTile& tile, Ahead& ahead, float* scratch) {
    return encode_tile<16>(args, layout, encoder, tile, ahead, scratch);
}
LRC_AVX512 Hidden run(Width<16>, const LowrankConv2dArgs<Bfloat16>& args, const DirectLayout& layout,
                      const float* encoder, const ImageTile& tile, Ahead& ahead, float* scratch) {
    return encode_tile<16>(args, layout, encoder, tile, ahead, scratch);
}

}  // namespace

template <int kWidth, class T>
Hidden encode(Width<kWidth> width, const LowrankConv2dArgs<T>& args, const DirectLayout& layout,
              const float* encoder, const ImageTile& tile, Ahead& ahead, float* scratch) {
    return run(width, args, layout, encoder, tile, ahead, scratch);
}

template Hidden encode(Width<8>, const LowrankConv2dArgs<float>&, const DirectLayout&, const float*,
                       const ImageTile&, Ahead&, float*);
template Hidden encode(Width<8>, const LowrankConv2dArgs<Bfloat16>&, const DirectLayout&, const float*,
                       const ImageTile&, Ahead&, float*);
template Hidden encode(Width<16>, const LowrankConv2dArgs<float>&, const DirectLayout&, const float*,
                       const ImageTile&, Ahead&, float*);
template Hidden encode(Width<16>, const LowrankConv2dArgs<Bfloat16>&, const DirectLayout&, const float*,
                       const ImageTile&, Ahead&, float*);

}  // namespace lrc

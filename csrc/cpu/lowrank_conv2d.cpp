#include "ops/lowrank_conv2d.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/lowrank_conv2d_amx.h"
#include "cpu/lowrank_conv2d_tile.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

// A task is some output rows of one image. Their z stays in the cache: it is made a group at a time by direct
// convolution, from a copy of the group's input rows that has the zeros around them, and is then multiplied
// by U. The encoder's vectors run along the columns of the image, the decoder's along what lies side by side
// in the output: pixels, or channels. A stride over columns is taken out by the copy, which puts the columns
// of one remainder next to each other, so the loop over the taps only adds offsets.

namespace lrc {
namespace {

constexpr std::int64_t kPair =
    2 * kWide;                         // entries that the decoder's kernel makes side by side: with kLines
constexpr std::int64_t kLines = 6;     // lines of them it fills the registers of AVX2
constexpr int kRegisters = 16;         // of AVX2
constexpr std::int64_t kVectors = 12;  // of a part of z: whole calls of the encoder's kernels
constexpr std::int64_t kCopySize = 1 << 12;     // floats: half an L1 cache of 32 KiB
constexpr std::int64_t kDecoderSize = 1 << 12;  // the same of U
// Floats of a scratch on the stack, which unlike the heap never gives its pages back between two calls.
constexpr std::int64_t kLocalSize = 3 << 14;

// Cuts `size` into the fewest parts of at most `most`, as even as can be: part `index` begins here.
LRC_INLINE std::int64_t cut(std::int64_t size, std::int64_t most, std::int64_t index) {
    const std::int64_t parts = divide_up(size, most);
    return size / parts * index + std::min(index, size % parts);
}

// The factors in float32. Where channels lie side by side, U is transposed in strips of kPair filters,
// [strips, groups rank, kPair]; what is behind the last filter is of no meaning.
struct Weights {
    const float* encoder;
    const float* decoder;
    const float* bias;               // [filters, rounded up to kPair], zeros without one
    std::unique_ptr<float[]> owned;  // what is not the caller's
};

template <class T> LRC_INLINE void convert(const T* from, std::int64_t size, float* to) {
    for (std::int64_t i = 0; i < size; ++i) to[i] = to_float(from[i]);
}

template <class T> LRC_INLINE void pack_weights(const LowrankConv2dArgs<T>& args, Weights& weights) {
    const std::int64_t inner = args.groups * args.rank;
    const std::int64_t filters = divide_up(args.filters, kPair) * kPair;
    const std::int64_t encoder_size =
        inner * (args.channels / args.groups) * args.rows.kernel * args.columns.kernel;
    constexpr bool kConverts = !std::is_same_v<T, float>;
    const bool packs = kConverts || args.channels_last;
    weights.owned = std::make_unique_for_overwrite<float[]>(filters + (packs ? filters * inner : 0) +
                                                            (kConverts ? encoder_size : 0));
    float* bias = weights.owned.get();
    float* decoder = bias + filters;
    std::fill_n(bias, filters, 0.0F);
    if (args.bias != nullptr) convert(args.bias, args.filters, bias);
    weights.bias = bias;
    if constexpr (kConverts) {
        convert(args.encoder, encoder_size, decoder + filters * inner);
        weights.encoder = decoder + filters * inner;
    } else {
        weights.encoder = args.encoder;
        weights.decoder = args.decoder;
    }
    if (packs) weights.decoder = decoder;
    if (!args.channels_last) {
        if (kConverts) convert(args.decoder, args.filters * inner, decoder);
        return;
    }
    for (std::int64_t f = 0; f < args.filters; f += kWide) {
        float* strip = decoder + f / kPair * kPair * inner + f % kPair;
        for (std::int64_t i = 0; i < inner; i += kWide) {
            const std::int64_t m = std::max<std::int64_t>(std::min(i, inner - kWide), 0);
            copy_block(args.decoder + f * inner + m, inner, std::min(kWide, args.filters - f),
                       std::min(kWide, inner - m), kPair, strip + m * kPair);
        }
    }
}

// One a type: the compiler clones no template.
LRC_MULTIVERSION void make_weights(const LowrankConv2dArgs<float>& args, Weights& weights) {
    pack_weights(args, weights);
}
LRC_MULTIVERSION void make_weights(const LowrankConv2dArgs<Bfloat16>& args, Weights& weights) {
    pack_weights(args, weights);
}

// Vectors [begin, end) of kRank rows of z from one group, kCount at once: each vector that is loaded serves
// all the ranks.
template <int kRank, int kCount>
LRC_INLINE void encode(const float* copy, const float* weights, const ConvLayout& layout, std::int64_t begin,
                       std::int64_t end, float* z) {
    const auto terms = static_cast<std::int64_t>(layout.taps.size());
    const std::int64_t* taps = layout.taps.data();
    for (std::int64_t v = begin; v < end; v += kCount) {
        const float* from[kCount];
        LRC_UNROLL
        for (int c = 0; c < kCount; ++c) from[c] = copy + layout.sources[v + c];
        Wide sums[kRank][kCount] = {};
        for (std::int64_t m = 0; m < terms; ++m) {
            // Either all that is loaded of x stays in registers beside the sums and a weight, or the weights.
            if constexpr (kRank * kCount + kCount < kRegisters) {
                Wide x[kCount];
                LRC_UNROLL
                for (int c = 0; c < kCount; ++c) x[c] = load_wide(from[c] + taps[m]);
                LRC_UNROLL
                for (int r = 0; r < kRank; ++r) {
                    LRC_UNROLL
                    for (int c = 0; c < kCount; ++c) sums[r][c] += weights[r * terms + m] * x[c];
                }
            } else {
                LRC_UNROLL
                for (int c = 0; c < kCount; ++c) {
                    const Wide x = load_wide(from[c] + taps[m]);
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
LRC_INLINE void encode_group(const float* copy, const float* weights, std::int64_t rank,
                             const ConvLayout& layout, std::int64_t vectors, float* z) {
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
                    encode<1, 8>(copy, rows, layout, begin, end, to);
                    break;
                case 2:
                    encode<2, 4>(copy, rows, layout, begin, end, to);
                    break;
                case 3:
                    encode<3, 4>(copy, rows, layout, begin, end, to);
                    break;
                default:
                    encode<4, 3>(copy, rows, layout, begin, end, to);
            }
        }
    }
}

// A product of two matrices with `terms` terms: out[i, j] = activation(sum_m a[i, m] b[m, j] + bias), the
// bias of j where channels lie side by side, else of i.
template <class T> struct Product {
    const float* a;  // [lines, terms], by its strides
    std::int64_t a_line;
    std::int64_t a_term;
    const float* b;  // [terms, kPair], by the stride of its terms
    std::int64_t b_term;
    const float* bias;
    T* out;  // [lines, width], by the stride of its lines
    std::int64_t out_line;
    std::int64_t width;  // <= kPair
    std::int64_t terms;
    Activation activation;
};

// Not inlined: its constants would take the registers of the sums.
LRC_MULTIVERSION void activate_all(Activation activation, float* values, const float* end) {
    for (; values < end; values += kWide) store_wide(values, activate(activation, load_wide(values)));
}

template <int kCount, bool kLast, class T> LRC_INLINE void multiply(const Product<T>& product) {
    Wide sums[kCount][2];
    LRC_UNROLL
    for (int i = 0; i < kCount; ++i) {
        LRC_UNROLL
        for (int v = 0; v < 2; ++v)
            sums[i][v] = kLast ? load_wide(product.bias + v * kWide) : Wide{} + product.bias[i];
    }
    const float* a = product.a;
    const float* b = product.b;
    for (std::int64_t m = 0; m < product.terms; ++m, a += product.a_term, b += product.b_term) {
        const Wide low = load_wide(b), high = load_wide(b + kWide);
        LRC_UNROLL
        for (int i = 0; i < kCount; ++i) {
            const float factor = a[kLast ? i : i * product.a_line];
            sums[i][0] += factor * low;
            sums[i][1] += factor * high;
        }
    }
    if (product.activation == Activation::kRelu) {
        LRC_UNROLL
        for (int i = 0; i < kCount; ++i) {
            LRC_UNROLL
            for (int v = 0; v < 2; ++v) sums[i][v] = activate(Activation::kRelu, sums[i][v]);
        }
    } else if (product.activation != Activation::kNone) {
        float held[kCount * kPair];
        LRC_UNROLL
        for (int i = 0; i < 2 * kCount; ++i) store_wide(held + i * kWide, sums[i / 2][i % 2]);
        activate_all(product.activation, held, held + kCount * kPair);
        LRC_UNROLL
        for (int i = 0; i < 2 * kCount; ++i) sums[i / 2][i % 2] = load_wide(held + i * kWide);
    }
    LRC_UNROLL
    for (int i = 0; i < kCount; ++i) {
        T* out = product.out + i * product.out_line;
        if (product.width == kPair) {
            store_wide(out, sums[i][0]);
            store_wide(out + kWide, sums[i][1]);
        } else {
            store_some(out, sums[i][0], std::min(kWide, product.width));
            store_some(out + kWide, sums[i][1], std::max<std::int64_t>(product.width - kWide, 0));
        }
    }
}

template <bool kLast, class T> LRC_INLINE void multiply(const Product<T>& product, std::int64_t lines) {
    switch (lines) {
        case 1:
            return multiply<1, kLast>(product);
        case 2:
            return multiply<2, kLast>(product);
        case 3:
            return multiply<3, kLast>(product);
        case 4:
            return multiply<4, kLast>(product);
        case 5:
            return multiply<5, kLast>(product);
        default:
            return multiply<6, kLast>(product);
    }
}

// All filters of a tile of `pixels` pixels, where pixels lie side by side; `out` is its first pixel of the
// first filter.
template <class T>
LRC_INLINE void decode(const LowrankConv2dArgs<T>& args, const ConvLayout& layout, const Weights& weights,
                       const float* z, std::int64_t pixels, T* out) {
    const std::int64_t terms = args.groups * args.rank;
    const std::int64_t plane = args.rows.out * args.columns.out;
    for (std::int64_t pixel = 0; pixel < pixels; pixel += kPair) {
        for (std::int64_t part = 0; part < divide_up(args.filters, kLines); ++part) {
            const std::int64_t first = cut(args.filters, kLines, part);
            const Product<T> product{.a = weights.decoder + first * terms,
                                     .a_line = terms,
                                     .a_term = 1,
                                     .b = z + pixel,
                                     .b_term = layout.z_stride,
                                     .bias = weights.bias + first,
                                     .out = out + first * plane + pixel,
                                     .out_line = plane,
                                     .width = std::min(kPair, pixels - pixel),
                                     .terms = terms,
                                     .activation = args.activation};
            multiply<false>(product, cut(args.filters, kLines, part + 1) - first);
        }
    }
}

// The same where channels lie side by side; `out` is the tile's first pixel.
template <class T>
LRC_INLINE void decode_last(const LowrankConv2dArgs<T>& args, const ConvLayout& layout,
                            const Weights& weights, const float* z, std::int64_t pixels, T* out) {
    const std::int64_t terms = args.groups * args.rank;
    const std::int64_t parts = divide_up(pixels, kLines), strips = divide_up(args.filters, kPair);
    // What is gone through again and again, all of U or one strip of it, stays in the L1 cache.
    const bool stays = strips * kPair * terms <= kDecoderSize;
    for (std::int64_t outer = 0; outer < (stays ? parts : strips); ++outer) {
        for (std::int64_t nested = 0; nested < (stays ? strips : parts); ++nested) {
            const std::int64_t part = stays ? outer : nested;
            const std::int64_t filter = kPair * (stays ? nested : outer);
            const std::int64_t first = cut(pixels, kLines, part);
            const Product<T> product{.a = z + first,
                                     .a_line = 1,
                                     .a_term = layout.z_stride,
                                     .b = weights.decoder + filter * terms,
                                     .b_term = kPair,
                                     .bias = weights.bias + filter,
                                     .out = out + first * args.filters + filter,
                                     .out_line = args.filters,
                                     .width = std::min(kPair, args.filters - filter),
                                     .terms = terms,
                                     .activation = args.activation};
            multiply<true>(product, cut(pixels, kLines, part + 1) - first);
        }
    }
}

template <class T>
LRC_INLINE void run_tile(const LowrankConv2dArgs<T>& args, const ConvLayout& layout, const Weights& weights,
                         std::int64_t task, float* scratch) {
    alignas(64) float local[kLocalSize];
    const std::int64_t image = task / layout.tiles;
    const std::int64_t row = task % layout.tiles * layout.tile_rows;
    const std::int64_t count = std::min(layout.tile_rows, args.rows.out - row);
    const std::int64_t vectors = count * divide_up(args.columns.out, kWide);
    const std::int64_t inside = args.channels / args.groups;
    const auto terms = static_cast<std::int64_t>(layout.taps.size());
    float* z = scratch == nullptr ? local : scratch;
    float* copy = z + args.groups * args.rank * layout.z_stride;
    for (std::int64_t block = 0; block < args.groups; block += layout.group_block) {
        const std::int64_t end = std::min(block + layout.group_block, args.groups);
        const bool clears = block == 0 || !layout.keeps_zeros;
        copy_input(args, layout, image, block * inside, (end - block) * inside, row, count, clears, copy);
        for (std::int64_t group = block; group < end; ++group) {
            encode_group(copy + (group - block) * layout.group_size,
                         weights.encoder + group * args.rank * terms, args.rank, layout, vectors,
                         z + group * args.rank * layout.z_stride);
        }
    }
    const std::int64_t pixel = row * args.columns.out;
    T* out = args.out + image * args.filters * args.rows.out * args.columns.out;
    const std::int64_t pixels = count * args.columns.out;
    if (args.channels_last) {
        decode_last(args, layout, weights, z, pixels, out + pixel * args.filters);
    } else {
        decode(args, layout, weights, z, pixels, out + pixel);
    }
}

LRC_MULTIVERSION void run(const LowrankConv2dArgs<float>& args, const ConvLayout& layout,
                          const Weights& weights, std::int64_t task, float* scratch) {
    run_tile(args, layout, weights, task, scratch);
}
LRC_MULTIVERSION void run(const LowrankConv2dArgs<Bfloat16>& args, const ConvLayout& layout,
                          const Weights& weights, std::int64_t task, float* scratch) {
    run_tile(args, layout, weights, task, scratch);
}

struct Free {
    void operator()(float* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<float, Free>;

Scratch make_scratch(std::int64_t size) {
    void* p = std::aligned_alloc(64, divide_up(size * sizeof(float), 64) * 64);
    if (p == nullptr) throw std::bad_alloc();
    return Scratch(static_cast<float*>(p));
}

}  // namespace

template <class T> void lowrank_conv2d(Cpu, const LowrankConv2dArgs<T>& args) {
    if (args.batch * args.filters * args.rows.out * args.columns.out == 0) return;
    if constexpr (std::is_same_v<T, Bfloat16>) {
        if (has_amx() && fills_tiles(args)) return lowrank_conv2d_amx(args);
    }
    const ConvLayout layout = make_layout(args);
    Weights weights{};
    make_weights(args, weights);
    const std::int64_t tasks = args.batch * layout.tiles;
    const std::int64_t size =
        args.groups * args.rank * layout.z_stride + layout.group_block * layout.group_size;
    std::vector<Scratch> scratch(worker_count(args.threads, tasks));
    if (size > kLocalSize) {
        for (Scratch& one : scratch) one = make_scratch(size);
    }
    parallel_for(args.threads, tasks, [&](int worker, std::int64_t task) noexcept {
        run(args, layout, weights, task, scratch[worker].get());
    });
}

template void lowrank_conv2d(Cpu, const LowrankConv2dArgs<float>&);
template void lowrank_conv2d(Cpu, const LowrankConv2dArgs<Bfloat16>&);

}  // namespace lrc

#include "ops/lowrank_conv2d.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/conv_factors.h"
#include "cpu/lowrank_conv2d.h"
#include "cpu/lowrank_conv2d_amx.h"
#include "cpu/lowrank_conv2d_decode.h"
#include "cpu/lowrank_conv2d_encode.h"
#include "cpu/lowrank_conv2d_tile.h"
#include "cpu/lowrank_conv2d_weights.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

// A task is some output rows of one image. Their z stays in the cache: it is made a group at a time, by
// direct convolution or by pairs of rows (row_pairs.h), from a copy of the group's input rows that has the
// zeros around them, and is then multiplied by U. The encoder's vectors run along the columns of the image,
// the decoder's along what lies side by side in the output: pixels, or channels. A stride over columns is
// taken out by the copy, which puts the columns of one remainder next to each other, so the loop over the
// taps only adds offsets.

namespace lrc {
namespace {

// Floats of a scratch on the stack, which unlike the heap never gives its pages back between two calls.
constexpr std::int64_t kLocalSize = 3 << 14;

LRC_MULTIVERSION void activate_all(Activation activation, float* values, const float* end) {
    for (; values < end; values += kWide) store_wide(values, activate(activation, load_wide(values)));
}

// One a type: the compiler clones no template.
LRC_MULTIVERSION void make_weights(const LowrankConv2dArgs<float>& args, std::int64_t pair,
                                   PackedWeights& packed) {
    pack_weights(args, pair, packed);
}
LRC_MULTIVERSION void make_weights(const LowrankConv2dArgs<Bfloat16>& args, std::int64_t pair,
                                   PackedWeights& packed) {
    pack_weights(args, pair, packed);
}

// Floats of the scratch of encode_pairs.
template <class T>
LRC_INLINE std::int64_t pairs_size(const LowrankConv2dArgs<T>& args, const ConvLayout& layout) {
    return layout.paired ? kParts * (args.rank * layout.sum_stride + layout.part_size) : 0;
}

template <int kWidth, class T>
LRC_INLINE void run_tile(const LowrankConv2dArgs<T>& args, const ConvLayout& layout, const Weights& weights,
                         std::int64_t task, float* scratch) {
    alignas(64) float local[kLocalSize];
    const std::int64_t image = task / layout.tiles;
    const std::int64_t row = task % layout.tiles * layout.tile_rows;
    const std::int64_t count = std::min(layout.tile_rows, args.rows.out - row);
    const std::int64_t inside = args.channels / args.groups;
    float* z = scratch == nullptr ? local : scratch;
    float* pairs = z + args.groups * args.rank * layout.z_stride;
    float* copy = pairs + pairs_size(args, layout);
    for (std::int64_t block = 0; block < args.groups; block += layout.group_block) {
        const std::int64_t end = std::min(block + layout.group_block, args.groups);
        const bool clears = block == 0 || !layout.keeps_zeros;
        copy_input(args, layout, image, block * inside, (end - block) * inside, row, made_rows(layout, count),
                   clears, copy);
        for (std::int64_t group = block; group < end; ++group) {
            const float* mine = copy + (group - block) * layout.group_size;
            const float* encoder = weights.encoder + group * weights.encoder_group;
            float* to = z + group * args.rank * layout.z_stride;
            if (layout.paired) {
                encode_pairs<kWidth>(args, layout, mine, encoder, count, pairs, to);
            } else {
                encode_group(Width<kWidth>{}, mine, encoder, args.rank, layout,
                             count * divide_up(args.columns.out, kWidth), to);
            }
        }
    }
    const std::int64_t pixel = row * args.columns.out;
    T* out = args.out + image * args.filters * args.rows.out * args.columns.out;
    const std::int64_t pixels = count * args.columns.out;
    if (args.channels_last) {
        decode_last<kWidth>(args, layout, weights, z, pixels, out + pixel * args.filters);
    } else {
        decode<kWidth>(args, layout, weights, z, pixels, out + pixel);
    }
}

LRC_MULTIVERSION void run(Width<8>, const LowrankConv2dArgs<float>& args, const ConvLayout& layout,
                          const Weights& weights, std::int64_t task, float* scratch) {
    run_tile<8>(args, layout, weights, task, scratch);
}
LRC_MULTIVERSION void run(Width<8>, const LowrankConv2dArgs<Bfloat16>& args, const ConvLayout& layout,
                          const Weights& weights, std::int64_t task, float* scratch) {
    run_tile<8>(args, layout, weights, task, scratch);
}
LRC_AVX512 void run(Width<16>, const LowrankConv2dArgs<float>& args, const ConvLayout& layout,
                    const Weights& weights, std::int64_t task, float* scratch) {
    run_tile<16>(args, layout, weights, task, scratch);
}
LRC_AVX512 void run(Width<16>, const LowrankConv2dArgs<Bfloat16>& args, const ConvLayout& layout,
                    const Weights& weights, std::int64_t task, float* scratch) {
    run_tile<16>(args, layout, weights, task, scratch);
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

template <int kWidth, class T> void lowrank_conv2d(Width<kWidth> width, const LowrankConv2dArgs<T>& args) {
    if (args.batch * args.filters * args.rows.out * args.columns.out == 0) return;
    const ConvLayout layout = make_layout<kWidth>(args);
    const auto make = [](const LowrankConv2dArgs<T>& standard) {
        auto made = std::make_shared<PackedWeights>();
        make_weights(standard, kPair<kWidth>, *made);
        return made;
    };
    const auto packed = packed_factors<PackedWeights>(args, kWidth, packs_encoder(args), make);
    const Weights weights = packed->with(args);
    const std::int64_t tasks = args.batch * layout.tiles;
    const std::int64_t size = args.groups * args.rank * layout.z_stride + pairs_size(args, layout) +
                              layout.group_block * layout.group_size;
    std::vector<Scratch> scratch(worker_count(args.threads, tasks));
    if (size > kLocalSize) {
        for (Scratch& one : scratch) one = make_scratch(size);
    }
    parallel_for(args.threads, tasks, [&](int worker, std::int64_t task) noexcept {
        run(width, args, layout, weights, task, scratch[worker].get());
    });
}

template void lowrank_conv2d(Width<8>, const LowrankConv2dArgs<float>&);
template void lowrank_conv2d(Width<16>, const LowrankConv2dArgs<float>&);
template void lowrank_conv2d(Width<8>, const LowrankConv2dArgs<Bfloat16>&);
template void lowrank_conv2d(Width<16>, const LowrankConv2dArgs<Bfloat16>&);

template <class T> void lowrank_conv2d(Cpu, const LowrankConv2dArgs<T>& args) {
    if constexpr (std::is_same_v<T, Bfloat16>) {
        if (has_amx() && fills_tiles(args)) return lowrank_conv2d_amx(args);
    }
    // Wide vectors would be half empty on rows of up to 8 pixels.
    if (has_avx512() && args.columns.out > 8) {
        lowrank_conv2d(Width<16>{}, args);
    } else {
        lowrank_conv2d(Width<8>{}, args);
    }
}

template void lowrank_conv2d(Cpu, const LowrankConv2dArgs<float>&);
template void lowrank_conv2d(Cpu, const LowrankConv2dArgs<Bfloat16>&);

}  // namespace lrc

#include "ops/lowrank_conv2d.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/conv_factors.h"
#include "cpu/lowrank_conv2d.h"
#include "cpu/lowrank_conv2d_amx.h"
#include "cpu/lowrank_conv2d_decode.h"
#include "cpu/lowrank_conv2d_direct.h"
#include "cpu/lowrank_conv2d_tile.h"
#include "cpu/lowrank_conv2d_weights.h"
#include "cpu/lowrank_conv2d_winograd.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

// A task is some output rows of one image. Their z stays in the cache: it is made a group at a time, as
// direct sums or by Winograd's algorithm, and is then multiplied by U.

namespace lrc {
namespace {

// Floats of a scratch on the stack, which unlike the heap never gives its pages back between two calls.
constexpr std::int64_t kLocalSize = 5 << 14;
// Bytes of images that a cache is taken to hold: chosen between 1.6 MB, where fetching ahead took 3 %, and 51
// MB, where it gave 8 %, for which no benchmark here stands.
constexpr std::int64_t kCachedBytes = 1 << 22;

LRC_MULTIVERSION void activate_all(Activation activation, float* values, const float* end) {
    for (; values < end; values += kWide) store_wide(values, activate(activation, load_wide(values)));
}

// One a type: the compiler clones no template.
LRC_MULTIVERSION void make_weights(const LowrankConv2dArgs<float>& args, std::int64_t width,
                                   PackedWeights& packed) {
    pack_weights(args, width, packed);
}
LRC_MULTIVERSION void make_weights(const LowrankConv2dArgs<Bfloat16>& args, std::int64_t width,
                                   PackedWeights& packed) {
    pack_weights(args, width, packed);
}

// Not inlined: the loops need all registers.
LRC_MULTIVERSION void decode(Width<8>, const LowrankConv2dArgs<float>& args, const Weights& weights,
                             const Hidden& hidden, const ImageTile& tile) {
    decode_tile<8>(args, weights, hidden, tile);
}
LRC_MULTIVERSION void decode(Width<8>, const LowrankConv2dArgs<Bfloat16>& args, const Weights& weights,
                             const Hidden& hidden, const ImageTile& tile) {
    decode_tile<8>(args, weights, hidden, tile);
}
LRC_AVX512 void decode(Width<16>, const LowrankConv2dArgs<float>& args, const Weights& weights,
                       const Hidden& hidden, const ImageTile& tile) {
    decode_tile<16>(args, weights, hidden, tile);
}
LRC_AVX512 void decode(Width<16>, const LowrankConv2dArgs<Bfloat16>& args, const Weights& weights,
                       const Hidden& hidden, const ImageTile& tile) {
    decode_tile<16>(args, weights, hidden, tile);
}

// What one task writes, and what the next one of its thread will read, where the caches hold neither.
template <class T>
Ahead look_ahead(const LowrankConv2dArgs<T>& args, const Tiling& tiling, std::int64_t task,
                 std::int64_t calls) {
    const std::int64_t line_in = args.columns.in * args.channels * sizeof(T);
    const std::int64_t line_out = args.columns.out * args.filters * sizeof(T);
    const std::int64_t size = args.batch * (args.rows.in * line_in + args.rows.out * line_out);
    if (!args.channels_last || size < kCachedBytes) return {};
    const ImageTile tile = find_tile(args, tiling, task);
    const std::int64_t tasks = args.batch * tiling.tiles;
    const ImageTile next = find_tile(args, tiling, std::min(task + std::max(args.threads, 1), tasks - 1));
    const std::int64_t row = std::min(next.row * args.rows.stride, args.rows.in);
    const std::int64_t rows = std::min(next.rows * args.rows.stride, args.rows.in - row);
    const auto* input = reinterpret_cast<const char*>(args.input);
    const auto* out = reinterpret_cast<const char*>(args.out);
    return {{input + (next.image * args.rows.in + row) * line_in, rows * line_in},
            {out + (tile.image * args.rows.out + tile.row) * line_out, tile.rows * line_out},
            calls};
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

// All tasks, by the encoder of the layout.
template <int kWidth, class T, class Layout>
void run(Width<kWidth> width, const LowrankConv2dArgs<T>& args, const Tiling& tiling, const Layout& layout) {
    const auto make = [](const LowrankConv2dArgs<T>& standard) {
        auto made = std::make_shared<PackedWeights>();
        make_weights(standard, kWidth, *made);
        return made;
    };
    const auto packed = packed_factors<PackedWeights>(args, kWidth, packs_encoder(args), make);
    const Weights weights = packed->with(args);
    const std::int64_t tasks = args.batch * tiling.tiles, calls = fetch_calls(args, layout, tiling.rows);
    const std::int64_t size = scratch_size(args, layout);
    std::vector<Scratch> scratch(worker_count(args.threads, tasks));
    if (size > kLocalSize) {
        for (Scratch& one : scratch) one = make_scratch(size);
    }
    parallel_for(args.threads, tasks, [&](int worker, std::int64_t task) noexcept {
        alignas(64) float local[kLocalSize];
        float* mine = scratch[worker] == nullptr ? local : scratch[worker].get();
        const ImageTile tile = find_tile(args, tiling, task);
        Ahead ahead = look_ahead(args, tiling, task, calls);
        decode(width, args, weights, encode(width, args, layout, weights.encoder, tile, ahead, mine), tile);
    });
}

// Whether the encoder's vectors of 16 floats, of ranks or of pixels of a row, are more than half full.
template <class T> bool fills_wide_vectors(const LowrankConv2dArgs<T>& args) {
    const std::int64_t size = uses_winograd(args) ? args.rank : args.columns.out;
    return size % 16 == 0 || size % 16 > 8 || size > 64;
}

}  // namespace

template <int kWidth, class T> void lowrank_conv2d(Width<kWidth> width, const LowrankConv2dArgs<T>& args) {
    if (args.batch * args.filters * args.rows.out * args.columns.out == 0) return;
    const bool winograd = uses_winograd(args);
    const Tiling tiling = cut_images(args, winograd);
    if (winograd) {
        run(width, args, tiling, make_winograd_layout<kWidth>(args, tiling.rows));
    } else {
        run(width, args, tiling, make_direct_layout<kWidth>(args, tiling.rows));
    }
}

template void lowrank_conv2d(Width<8>, const LowrankConv2dArgs<float>&);
template void lowrank_conv2d(Width<16>, const LowrankConv2dArgs<float>&);
template void lowrank_conv2d(Width<8>, const LowrankConv2dArgs<Bfloat16>&);
template void lowrank_conv2d(Width<16>, const LowrankConv2dArgs<Bfloat16>&);

template <class T> void lowrank_conv2d(Cpu, const LowrankConv2dArgs<T>& args) {
    if constexpr (std::is_same_v<T, Bfloat16>) {
        if (args.algorithm == ConvEncoder::kAuto && has_amx() && fills_tiles(args))
            return lowrank_conv2d_amx(args);
    }
    if (has_avx512() && fills_wide_vectors(args)) {
        lowrank_conv2d(Width<16>{}, args);
    } else {
        lowrank_conv2d(Width<8>{}, args);
    }
}

template void lowrank_conv2d(Cpu, const LowrankConv2dArgs<float>&);
template void lowrank_conv2d(Cpu, const LowrankConv2dArgs<Bfloat16>&);

}  // namespace lrc

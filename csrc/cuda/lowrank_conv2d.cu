#include <limits>

#include "cuda/launch.cuh"
#include "cuda/pixel_tiles.cuh"
#include "ops/lowrank_conv2d.h"

// A block computes z of a tile of pixels, all groups of it, into shared memory, then all filters from there.
// Both are products of a tile of pixels and a tile of columns, along their terms in chunks: one loop goes
// through all chunks of all groups, then through those of the decoder, and copies chunks ahead of itself, so
// that the decoder is on its way before z is complete. A pixel's terms, the taps of its window and their
// channels, are gathered from the image: any stride, padding and dilation. All of it counts in bytes, so that
// float32 has half as many terms in a chunk.

namespace lrc {
namespace {

using namespace pixel_tiles;

template <class S> __device__ void clear(Sums<S>& sums) {
    LRC_UNROLL
    for (auto& pixels : sums) {
        LRC_UNROLL
        for (auto& entries : pixels) entries[0] = entries[1] = entries[2] = entries[3] = 0;
    }
}

// sums += pixels columns^T over one chunk, for the columns that exist.
template <class S, class T>
__device__ void add_products(const T* pixels, int pixel_stride, const T* columns, int existing,
                             Sums<S>& sums) {
    const int lane = threadIdx.x % kWarpSize;
    const T* pixel = pixels + lane % 16 * pixel_stride + lane / 16 * kWideEntries<T>;
    const T* column = columns + (lane / 16 * 8 + lane % 8) * kTileStride<T> + lane / 8 % 2 * kWideEntries<T>;
    for (int k = 0; k < kTileTerms<T>; k += 2 * kWideEntries<T>) {
        Words4 a[S::kWarpPixels / 16];
        LRC_UNROLL
        for (int i = 0; i < S::kWarpPixels / 16; ++i) a[i] = load_matrices(pixel + i * 16 * pixel_stride + k);
        LRC_UNROLL
        for (int j = 0; j < S::kWarpColumns / 16; ++j) {
            if (j * 16 >= existing) continue;
            const Words4 b = load_matrices(column + j * 16 * kTileStride<T> + k);
            LRC_UNROLL
            for (int i = 0; i < S::kWarpPixels / 16; ++i) {
                multiply_add<T>(sums[i][2 * j], a[i], b.word[0], b.word[1]);
                multiply_add<T>(sums[i][2 * j + 1], a[i], b.word[2], b.word[3]);
            }
        }
    }
}

template <class S, class T>
__device__ void store_hidden(const Problem<T>& problem, int group, int first_pixel, int first_column,
                             const Sums<S>& sums, T* hidden) {
    const int lane = threadIdx.x % kWarpSize;
    LRC_UNROLL
    for (int i = 0; i < S::kWarpPixels / 16; ++i) {
        LRC_UNROLL
        for (int j = 0; j < S::kWarpColumns / 8; ++j) {
            LRC_UNROLL
            for (int entry = 0; entry < 4; ++entry) {
                const int pixel = first_pixel + i * 16 + entry / 2 * 8 + lane / 4;
                const int column = first_column + j * 8 + lane % 4 * 2 + entry % 2;
                if (column >= problem.rank) continue;
                hidden[pixel * problem.hidden_stride + group * problem.rank + column] =
                    round_to<T>(sums[i][j][entry]);
            }
        }
    }
}

// Bias, activation and rounding of the neighbouring entries that 16 bytes hold, in their place.
template <class T>
__device__ void finish(const Problem<T>& problem, float* sums, std::int64_t pixel, int column) {
    auto* words = reinterpret_cast<Words4*>(sums);
    const auto value = [&](int i) {
        const bool biased = problem.bias != nullptr && column + i < problem.filters;
        return activate(problem.activation, sums[i] + (biased ? to_float(problem.bias[column + i]) : 0.0F));
    };
    LRC_KEEP_LOOP
    for (int i = 0; i < 4; ++i) words->word[i] = pack_word<T>(i, value);
    T* to = problem.out + pixel * problem.filters + column;
    if (problem.wide_out) {
        *reinterpret_cast<Words4*>(to) = *words;
        return;
    }
    LRC_KEEP_LOOP
    for (int i = 0; i < kWideEntries<T> && column + i < problem.filters; ++i)
        to[i] = reinterpret_cast<T*>(words)[i];
}

// Through shared memory, 8 pixels at a time, so that whole lines are written.
template <class S, class T>
__device__ void store_out(const Problem<T>& problem, int first_pixel, int first_column, const Sums<S>& sums,
                          float* staged) {  // [8, kOutStride], of this warp
    constexpr int kAcross = S::kWarpColumns / kWideEntries<T>;
    const int lane = threadIdx.x % kWarpSize;
    LRC_KEEP_LOOP
    for (int i = 0; i < S::kWarpPixels / 8; ++i) {
        LRC_UNROLL
        for (int known = 0; known < S::kWarpPixels / 8; ++known) {  // registers have no run-time index
            if (known != i) continue;
            LRC_UNROLL
            for (int j = 0; j < S::kWarpColumns / 8; ++j) {
                float* to = staged + lane / 4 * S::kOutStride + j * 8 + lane % 4 * 2;
                to[0] = sums[known / 2][j][known % 2 * 2];
                to[1] = sums[known / 2][j][known % 2 * 2 + 1];
            }
        }
        __syncwarp();
        LRC_KEEP_LOOP
        for (int at = lane; at < 8 * kAcross; at += kWarpSize) {
            const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * S::kPixels + first_pixel;
            const std::int64_t pixel = first + i * 8 + at / kAcross;
            const int column = at % kAcross * kWideEntries<T>;
            if (pixel >= problem.pixels || first_column + column >= problem.filters) continue;
            finish(problem, staged + at / kAcross * S::kOutStride + column, pixel, first_column + column);
        }
        __syncwarp();
    }
}

// The columns of z beyond the last rank: terms of the decoder's last chunk.
template <class S, class T> __device__ void clear_padding(const Problem<T>& problem, T* hidden) {
    const int padding = problem.hidden_stride - problem.inner;
    for (int at = threadIdx.x; at < S::kPixels * padding; at += S::kThreads)
        hidden[at / padding * problem.hidden_stride + problem.inner + at % padding] = T{};
}

template <class S, class T>
__global__ void __launch_bounds__(S::kThreads, 1) lowrank_conv2d_kernel(Problem<T> problem) {
    const Shared<T> shared = carve_shared<S, T>();
    const Steps<S, T> steps{problem};
    const int warp = threadIdx.x / kWarpSize;
    const int first_pixel = warp / S::kColumnWarps * S::kWarpPixels;
    const int first_column = warp % S::kColumnWarps * S::kWarpColumns;
    find_origins<S>(problem, shared.origins);
    clear_padding<S>(problem, shared.hidden);
    __syncthreads();
    Step ahead = steps.first();
    for (int slot = 0; slot + 1 < kTileStages; ++slot, steps.advance(ahead)) {
        if (!steps.ended(ahead)) stage<S>(problem, shared, ahead, slot);
        commit_copies();
    }
    Sums<S> sums;
    clear<S>(sums);
    int slot = 0;
    for (Step step = steps.first(); !steps.ended(step); steps.advance(step)) {
        wait_for_copies<kTileStages - 2>();
        __syncthreads();  // this chunk is there, and nobody uses the one before it
        if (!steps.ended(ahead)) stage<S>(problem, shared, ahead, (slot + kTileStages - 1) % kTileStages);
        commit_copies();
        steps.advance(ahead);
        const bool decodes = step.part == problem.groups;
        const int column = step.tile * S::kColumns + first_column;
        const T* pixels =
            decodes ? shared.hidden + first_pixel * problem.hidden_stride + step.chunk * kTileTerms<T>
                    : shared.pixels + (slot * S::kPixels + first_pixel) * kTileStride<T>;
        const T* columns = shared.columns + (slot * S::kColumns + first_column) * kTileStride<T>;
        add_products<S>(pixels, decodes ? problem.hidden_stride : kTileStride<T>, columns,
                        steps.width(step.part) - column, sums);
        slot = (slot + 1) % kTileStages;
        if (!steps.ends_tile(step)) continue;
        if (decodes) {
            float* staged = reinterpret_cast<float*>(shared.pixels) + warp * S::kWarpOut;
            store_out<S>(problem, first_pixel, column, sums, staged);
        } else {
            store_hidden<S>(problem, step.part, first_pixel, column, sums, shared.hidden);
        }
        clear<S>(sums);
    }
}

int to_int(std::int64_t size) {
    if (size > std::numeric_limits<int>::max())
        throw std::invalid_argument("lowrank_conv2d: a size does not fit 32 bits: " + std::to_string(size));
    return static_cast<int>(size);
}

template <class T> bool is_wide(const T* address, std::int64_t entries) {
    return reinterpret_cast<std::uintptr_t>(address) % sizeof(Words4) == 0 && entries % kWideEntries<T> == 0;
}

template <class T> Problem<T> make_problem(const LowrankConv2dArgs<T>& args) {
    const std::int64_t inside = args.channels / args.groups;
    const std::int64_t terms = inside * args.rows.kernel * args.columns.kernel;
    const std::int64_t inner = args.groups * args.rank;
    to_int(args.rows.in + 2 * args.rows.padding);  // positions inside the padded image
    to_int(args.columns.in + 2 * args.columns.padding);
    return {.input = args.input,
            .encoder = args.encoder,
            .decoder = args.decoder,
            .bias = args.bias,
            .out = args.out,
            .pixels = args.batch * args.rows.out * args.columns.out,
            .image_rows = to_int(args.rows.in),
            .image_columns = to_int(args.columns.in),
            .channels = to_int(args.channels),
            .out_rows = to_int(args.rows.out),
            .out_columns = to_int(args.columns.out),
            .filters = to_int(args.filters),
            .kernel_columns = to_int(args.columns.kernel),
            .row_stride = to_int(args.rows.stride),
            .row_padding = to_int(args.rows.padding),
            .row_dilation = to_int(args.rows.dilation),
            .column_stride = to_int(args.columns.stride),
            .column_padding = to_int(args.columns.padding),
            .column_dilation = to_int(args.columns.dilation),
            .inside = to_int(inside),
            .groups = to_int(args.groups),
            .rank = to_int(args.rank),
            .terms = to_int(terms),
            .inner = to_int(inner),
            .hidden_stride = to_int(hidden_bytes(inner, sizeof(T)) / sizeof(T)),
            .activation = args.activation,
            .wide_input = is_wide(args.input, inside),
            .wide_encoder = is_wide(args.encoder, terms),
            .wide_decoder = is_wide(args.decoder, inner),
            .wide_out = is_wide(args.out, args.filters)};
}

template <class S, class T>
void launch_shape(Cuda device, const Problem<T>& problem, std::int64_t shared_bytes) {
    const std::int64_t blocks = (problem.pixels + S::kPixels - 1) / S::kPixels;
    launch(device, lowrank_conv2d_kernel<S, T>, static_cast<unsigned>(to_int(blocks)), S::kThreads,
           static_cast<std::size_t>(shared_bytes), problem);
}

}  // namespace

template <class T>
void lowrank_conv2d(Cuda device, const LowrankConv2dArgs<T>& args, const LowrankTile& tile) {
    const Problem<T> problem = make_problem(args);
    if (problem.pixels == 0 || problem.filters == 0) return;
    if (!args.channels_last) throw std::invalid_argument("lowrank_conv2d on CUDA needs channels_last images");
    if (tile.pixels == 128 && tile.columns == 128) {
        launch_shape<Shape<4, 2, 64>>(device, problem, tile.shared_bytes);
    } else if (tile.pixels == 128) {
        launch_shape<Shape<4, 1, 64>>(device, problem, tile.shared_bytes);
    } else if (tile.pixels == 64) {
        launch_shape<Shape<2, 2, 32>>(device, problem, tile.shared_bytes);
    } else {
        throw std::invalid_argument("lowrank_conv2d does not fit the shared memory of a block: " +
                                    std::to_string(tile.shared_bytes) + " bytes");
    }
}

template void lowrank_conv2d(Cuda, const LowrankConv2dArgs<float>&, const LowrankTile&);
template void lowrank_conv2d(Cuda, const LowrankConv2dArgs<Bfloat16>&, const LowrankTile&);
template void lowrank_conv2d(Cuda, const LowrankConv2dArgs<Half>&, const LowrankTile&);

}  // namespace lrc

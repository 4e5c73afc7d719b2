#include <limits>

#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "ops/lowrank_conv2d.h"
#include "ops/lowrank_linear.h"

// For few rows the time is that of reading the weights, each once: z = V x, and then y = U z, are two grids.
// The second one starts while the first runs and has its weights on their way before it waits for z. The rows
// of x are the 16 rows of a tensor core's product, 8 filters its columns. The order of the terms of a sum is
// free, so that a thread takes neighbouring ones, 16 bytes, for two products.

namespace lrc {
namespace {

constexpr int kWarps = 8;  // of a block: they share the terms of its sums
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kEntries = 4;  // of a product, in each lane
constexpr int kFilters = kLinearFilters;
// Terms of a warp at once: 16 bytes of each of 4 lanes.
template <class T> constexpr int kChunk = 4 * kWideEntries<T>;

// Filters of one matrix.
template <class T> struct Weights {
    const T* first;  // [filters, terms], of this block
    int filters, terms;
    bool wide;  // 16 bytes at a time
};

// 16 bytes of neighbouring entries, zeros from the `existing`th on.
template <class T> __device__ Words4 load_wide(const T* from, int existing, bool wide) {
    if (existing <= 0) return {};
    if (wide) return *reinterpret_cast<const Words4*>(from);
    constexpr int kRest = 32 - 8 * sizeof(T);
    Words4 result{};
    LRC_KEEP_LOOP
    for (int i = kWideEntries<T> - 1; i >= 0; --i) {  // shifts entry i in, below those that follow it
        std::uint32_t below = i < existing ? bits_of(from[i]) << kRest : 0u;
        LRC_UNROLL
        for (auto& word : result.word) {
            const std::uint64_t both = static_cast<std::uint64_t>(word) << 32 | below;
            below = word;
            word = static_cast<std::uint32_t>(both >> kRest);
        }
    }
    return result;
}

// A lane's share of a chunk: of one filter of each tile.
template <int kTiles> struct Share {
    Words4 tile[kTiles];
};

template <int kTiles, class T> __device__ Share<kTiles> load_share(const Weights<T>& weights, int chunk) {
    const int lane = threadIdx.x % kWarpSize;
    const int term = chunk * kChunk<T> + lane % 4 * kWideEntries<T>;
    Share<kTiles> share;
    LRC_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
        const int filter = tile * kFilters + lane / 4;
        const int existing = filter < weights.filters ? weights.terms - term : 0;
        const T* from = weights.first + static_cast<std::int64_t>(filter) * weights.terms + term;
        share.tile[tile] = load_wide(from, existing, weights.wide);
    }
    return share;
}

// Adds every stride-th chunk of terms from `chunk` on, with kAhead chunks of weights on their way. `rows(row,
// term)` gives 16 bytes of a row of x, or of z once `wait()` has returned.
template <int kTiles, int kAhead, class T, class Wait, class Rows>
__device__ void add_products(const Weights<T>& weights, int chunk, int stride, const Wait& wait,
                             const Rows& rows, float (&sums)[kTiles][kEntries]) {
    const int lane = threadIdx.x % kWarpSize;
    Share<kTiles> shares[kAhead];
    LRC_UNROLL
    for (int ahead = 0; ahead < kAhead; ++ahead)
        shares[ahead] = load_share<kTiles>(weights, chunk + ahead * stride);
    wait();
    while (chunk * kChunk<T> < weights.terms) {
        LRC_UNROLL
        for (int ahead = 0; ahead < kAhead; ++ahead, chunk += stride) {
            const Share<kTiles> share = shares[ahead];
            shares[ahead] = load_share<kTiles>(weights, chunk + kAhead * stride);
            const int term = chunk * kChunk<T> + lane % 4 * kWideEntries<T>;
            const Words4 low = rows(lane / 4, term);
            const Words4 high = rows(lane / 4 + 8, term);
            LRC_UNROLL
            for (int tile = 0; tile < kTiles; ++tile) {
                const Words4& b = share.tile[tile];
                multiply_add<T>(sums[tile], {low.word[0], high.word[0], low.word[1], high.word[1]}, b.word[0],
                                b.word[1]);
                multiply_add<T>(sums[tile], {low.word[2], high.word[2], low.word[3], high.word[3]}, b.word[2],
                                b.word[3]);
            }
        }
    }
}

// Calls f(row, filter, sum) once for each sum over the block's warps, in the order of the warps.
template <int kTiles, class F>
__device__ void for_each_sum(const float (&sums)[kTiles][kEntries], const F& f) {
    constexpr int kSums = kTiles * kEntries * kWarpSize;
    static_assert(kSums <= kThreads);
    float* shared = dynamic_shared<float>();  // [kWarps, kTiles, kEntries, kWarpSize]
    float* mine = shared + threadIdx.x / kWarpSize * kSums + threadIdx.x % kWarpSize;
    LRC_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
        LRC_UNROLL
        for (int entry = 0; entry < kEntries; ++entry)
            mine[(tile * kEntries + entry) * kWarpSize] = sums[tile][entry];
    }
    __syncthreads();
    const int at = threadIdx.x;
    if (at >= kSums) return;
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp * kSums + at];
    const int lane = at % kWarpSize;
    const int entry = at / kWarpSize % kEntries;
    const int tile = at / kWarpSize / kEntries;
    f(lane / 4 + entry / 2 * 8, tile * kFilters + lane % 4 * 2 + entry % 2, sum);
}

template <int kTiles> constexpr std::size_t kSharedBytes = sizeof(float) * kThreads * kTiles * kEntries;

template <class T> struct Linear {
    const T* input;
    const T* encoder;
    const T* decoder;
    const T* bias;
    T* out;
    float* hidden;  // [splits, rows, hidden_stride]
    int rows, inside, rank, inner, hidden_stride, filters, splits;
    int tiles;  // of a group's filters
    Activation activation;
    bool wide_input, wide_encoder, wide_decoder;
};

constexpr int kEncoderAhead = 8;
constexpr int kDecoderAhead = 4;
constexpr int kDecoderTiles = 2;  // each value of z that a lane reads serves two filters

// One block 8 filters of a group, and one of `splits` shares of their terms.
template <class T> __global__ void __launch_bounds__(kThreads, 2)
    lowrank_linear_encoder_kernel(Linear<T> linear) {
    let_next_grid_start();
    const int tile = blockIdx.x / linear.splits;
    const int split = blockIdx.x % linear.splits;
    const int group = tile / linear.tiles;
    const int first = tile % linear.tiles * kFilters;
    const int filter = group * linear.rank + first;
    const Weights<T> weights{linear.encoder + static_cast<std::int64_t>(filter) * linear.inside,
                             linear.rank - first, linear.inside, linear.wide_encoder};
    const std::int64_t row_stride = linear.inner / linear.rank * static_cast<std::int64_t>(linear.inside);
    const T* input = linear.input + static_cast<std::int64_t>(group) * linear.inside;
    float sums[1][kEntries] = {};
    add_products<1, kEncoderAhead>(
        weights, split * kWarps + threadIdx.x / kWarpSize, linear.splits * kWarps, [] {},
        [&](int row, int term) {
            const int existing = row < linear.rows ? linear.inside - term : 0;
            return load_wide(input + row * row_stride + term, existing, linear.wide_input);
        },
        sums);
    for_each_sum<1>(sums, [&](int row, int column, float sum) {
        if (row >= linear.rows || first + column >= linear.rank) return;
        const std::int64_t to = static_cast<std::int64_t>(split) * linear.rows + row;
        linear.hidden[to * linear.hidden_stride + filter + column] = sum;
    });
}

// z of one row, from `term` on, rounded to T: 16 bytes.
template <class T> __device__ Words4 load_hidden(const Linear<T>& linear, int row, int term) {
    if (row >= linear.rows || term >= linear.inner) return {};
    float z[kWideEntries<T>] = {};
    for (int split = 0; split < linear.splits; ++split) {
        const std::int64_t at = static_cast<std::int64_t>(split) * linear.rows + row;
        const auto* from = reinterpret_cast<const Words4*>(linear.hidden + at * linear.hidden_stride + term);
        LRC_UNROLL
        for (int i = 0; i < kWideEntries<T>; ++i) z[i] += std::bit_cast<float>(from[i / 4].word[i % 4]);
    }
    LRC_UNROLL
    for (int i = 1; i < kWideEntries<T>; ++i) z[i] = term + i < linear.inner ? z[i] : 0;
    const auto value = [&](int i) { return z[i]; };
    return {{pack_word<T>(0, value), pack_word<T>(1, value), pack_word<T>(2, value), pack_word<T>(3, value)}};
}

template <class T> __global__ void __launch_bounds__(kThreads, 2)
    lowrank_linear_decoder_kernel(Linear<T> linear) {
    const int first = blockIdx.x * kDecoderTiles * kFilters;
    const Weights<T> weights{linear.decoder + static_cast<std::int64_t>(first) * linear.inner,
                             linear.filters - first, linear.inner, linear.wide_decoder};
    float sums[kDecoderTiles][kEntries] = {};
    add_products<kDecoderTiles, kDecoderAhead>(
        weights, threadIdx.x / kWarpSize, kWarps, [] { wait_for_last_grid(); },
        [&](int row, int term) { return load_hidden(linear, row, term); }, sums);
    for_each_sum<kDecoderTiles>(sums, [&](int row, int column, float sum) {
        if (row >= linear.rows || first + column >= linear.filters) return;
        if (linear.bias != nullptr) sum += to_float(linear.bias[first + column]);
        const float y = activate(linear.activation, sum);
        linear.out[static_cast<std::int64_t>(row) * linear.filters + first + column] = round_to<T>(y);
    });
}

int to_int(std::int64_t size) {
    if (size > std::numeric_limits<int>::max())
        throw std::invalid_argument("lowrank_linear: a size does not fit 32 bits: " + std::to_string(size));
    return static_cast<int>(size);
}

template <class T> bool is_wide(const T* address, std::int64_t entries) {
    return reinterpret_cast<std::uintptr_t>(address) % sizeof(Words4) == 0 && entries % kWideEntries<T> == 0;
}

template <class T> Linear<T> make_linear(const LowrankLinearArgs<T>& args) {
    const std::int64_t inner = args.groups * args.rank;
    return {.input = args.input,
            .encoder = args.encoder,
            .decoder = args.decoder,
            .bias = args.bias,
            .out = args.out,
            .hidden = args.hidden,
            .rows = to_int(args.rows),
            .inside = to_int(args.inside),
            .rank = to_int(args.rank),
            .inner = to_int(inner),
            .hidden_stride = to_int(linear_hidden_stride(inner)),
            .filters = to_int(args.filters),
            .splits = to_int(linear_splits(args.groups, args.rank, args.inside)),
            .tiles = to_int((args.rank + kFilters - 1) / kFilters),
            .activation = args.activation,
            .wide_input = is_wide(args.input, args.inside),
            .wide_encoder = is_wide(args.encoder, args.inside),
            .wide_decoder = is_wide(args.decoder, inner)};
}

// More rows than a product has: images of one pixel.
template <class T>
void convolve(Cuda device, const LowrankLinearArgs<T>& args, const LowrankTile& tile) {
    constexpr ConvAxis kPoint{.in = 1, .out = 1, .kernel = 1, .stride = 1, .padding = 0, .dilation = 1};
    const LowrankConv2dArgs<T> images{.input = args.input,
                                      .encoder = args.encoder,
                                      .decoder = args.decoder,
                                      .bias = args.bias,
                                      .out = args.out,
                                      .channels_last = true,
                                      .batch = args.rows,
                                      .channels = args.groups * args.inside,
                                      .filters = args.filters,
                                      .groups = args.groups,
                                      .rank = args.rank,
                                      .rows = kPoint,
                                      .columns = kPoint,
                                      .activation = args.activation,
                                      .threads = args.threads};
    lowrank_conv2d(device, images, tile);
}

}  // namespace

template <class T>
void lowrank_linear(Cuda device, const LowrankLinearArgs<T>& args, const LowrankTile& tile) {
    if (args.rows == 0 || args.filters == 0) return;
    if (args.rows > kMaxCudaRows) return convolve(device, args, tile);
    const Linear<T> linear = make_linear(args);
    const std::int64_t encoders = args.groups * linear.tiles * linear.splits;
    const std::int64_t decoders = (args.filters + kDecoderTiles * kFilters - 1) / (kDecoderTiles * kFilters);
    if (encoders > 0) {
        launch(device, lowrank_linear_encoder_kernel<T>, static_cast<unsigned>(to_int(encoders)), kThreads,
               kSharedBytes<1>, linear);
    }
    launch_overlapping(device, lowrank_linear_decoder_kernel<T>, static_cast<unsigned>(to_int(decoders)),
                       kThreads, kSharedBytes<kDecoderTiles>, linear);
}

template void lowrank_linear(Cuda, const LowrankLinearArgs<float>&, const LowrankTile&);
template void lowrank_linear(Cuda, const LowrankLinearArgs<Bfloat16>&, const LowrankTile&);
template void lowrank_linear(Cuda, const LowrankLinearArgs<Half>&, const LowrankTile&);

}  // namespace lrc

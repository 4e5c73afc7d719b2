// A factored 2-D convolution: a grouped encoder, then a decoder of one pixel, in one pass over the image.
#pragma once

#include <cstdint>

#include "device.h"

namespace lrc {

// One spatial axis of the encoder; the decoder keeps the size. With padding on both sides,
// out = (in + 2 padding - dilation (kernel - 1) - 1) / stride + 1, rounded down.
struct ConvAxis {
    std::int64_t in;  // >= 0
    std::int64_t out;
    std::int64_t kernel;    // >= 1
    std::int64_t stride;    // >= 1
    std::int64_t padding;   // >= 0, zeros
    std::int64_t dilation;  // >= 1
};

// z[b, g rank + r, p] = sum_{i, taps} V[g rank + r, i, taps] x[b, g channels/groups + i, p stride + taps]
// y[b, o, p] = sum_q U[o, q] z[b, q, p] + bias[o]
// All tensors are contiguous and on one device. The terms of a sum are added in an order that depends neither
// on the batch nor on `threads`.
struct LowrankConv2dArgs {
    const float* input;    // [batch, channels, rows.in, columns.in]
    const float* encoder;  // V [groups rank, channels / groups, rows.kernel, columns.kernel]
    const float* decoder;  // U [filters, groups rank]
    const float* bias;     // [filters], or null
    float* out;            // [batch, filters, rows.out, columns.out], aliases nothing
    std::int64_t batch;
    std::int64_t channels;  // a multiple of groups
    std::int64_t filters;
    std::int64_t groups;  // >= 1
    std::int64_t rank;    // >= 1
    ConvAxis rows;
    ConvAxis columns;
    int threads;
};

// There is no CUDA twin: cuDNN runs the two convolutions well.
void lowrank_conv2d(Cpu device, const LowrankConv2dArgs& args);

}  // namespace lrc

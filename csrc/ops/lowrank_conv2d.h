// A factored 2-D convolution: a grouped encoder, then a decoder of one pixel, in one pass over the image.
#pragma once

#include <cstdint>

#include "device.h"
#include "math/activation.h"
#include "math/floats.h"
#include "ops/lowrank_tile.h"

namespace lrc {

class PackedFactors;  // cpu/packed_factors.h

// How the CPU twin makes z. What does not fit the sizes is not taken.
enum class ConvEncoder { kAuto, kDirect, kWinograd };

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
// y[b, o, p] = activation(sum_q U[o, q] z[b, q, p] + bias[o])
// All tensors are contiguous and on one device. Sums are of float32; z stays in float32, or is rounded to T
// where the second product runs on tensor cores or on the tiles of AMX. The terms of a sum are added in an
// order that depends neither on the batch nor on `threads`.
template <class T> struct LowrankConv2dArgs {
    const T* input;             // [batch, channels, rows.in, columns.in]
    const T* encoder;           // V [groups rank, channels / groups, rows.kernel, columns.kernel]
    bool encoder_last = false;  // V lies as [groups rank, rows.kernel, columns.kernel, channels / groups]
    const T* decoder;           // U [filters, groups rank]
    const T* bias;              // [filters], or null
    T* out;                     // [batch, filters, rows.out, columns.out], aliases nothing
    bool channels_last;         // input and out lie as [batch, rows, columns, channels] instead
    std::int64_t batch;
    std::int64_t channels;  // >= 0, a multiple of groups
    std::int64_t filters;   // >= 0
    std::int64_t groups;    // >= 1
    std::int64_t rank;      // >= 0, of a group; with 0, as with no channels, y is activation(bias)
    ConvAxis rows;
    ConvAxis columns;
    Activation activation;
    int threads;                                 // of the CPU twin; the CUDA twin ignores it
    PackedFactors* packed = nullptr;             // the same: what it keeps from a call to the next, or null
    ConvEncoder algorithm = ConvEncoder::kAuto;  // the same
};

// For T = float and Bfloat16. Brings the factors into its own layout, in each call or where `packed` has none
// made of equal ones.
template <class T> void lowrank_conv2d(Cpu device, const LowrankConv2dArgs<T>& args);
// For T = float, Bfloat16 and Half, channels_last, encoder_last and z rounded to T. `tile` is what
// choose_tile gives for these sizes and the device.
template <class T>
void lowrank_conv2d(Cuda device, const LowrankConv2dArgs<T>& args, const LowrankTile& tile);

}  // namespace lrc

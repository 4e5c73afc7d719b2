// Many rows of a factored linear layer, on tiles: the pixels of one image of one column.
#pragma once

#include "cpu/lowrank_conv2d_amx.h"
#include "ops/lowrank_linear.h"

namespace lrc {

LRC_INLINE LowrankConv2dArgs<Bfloat16> as_image(const LowrankLinearArgs<Bfloat16>& args) {
    return {
        .input = args.input,
        .encoder = args.encoder,
        .decoder = args.decoder,
        .bias = args.bias,
        .out = args.out,
        .channels_last = true,
        .batch = 1,
        .channels = args.groups * args.inside,
        .filters = args.filters,
        .groups = args.groups,
        .rank = args.rank,
        .rows = {.in = args.rows, .out = args.rows, .kernel = 1, .stride = 1, .padding = 0, .dilation = 1},
        .columns = {.in = 1, .out = 1, .kernel = 1, .stride = 1, .padding = 0, .dilation = 1},
        .activation = args.activation,
        .threads = args.threads};
}

}  // namespace lrc

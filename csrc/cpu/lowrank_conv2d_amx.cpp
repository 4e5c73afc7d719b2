#include "cpu/lowrank_conv2d_amx.h"

#include "cpu/simd.h"

namespace lrc {

#ifdef LRC_WITH_AMX

namespace {

LRC_MULTIVERSION void run(const tiled::ConvArgs& args, const tiled::Layout& layout,
                          const tiled::Factors& factors, std::int64_t task, const tiled::Scratch& scratch) {
    tiled::run_task<AmxTiles>(args, layout, factors, task, scratch);
}

}  // namespace

void lowrank_conv2d_amx(const LowrankConv2dArgs<Bfloat16>& args) { tiled::run_all(args, run); }

#else

void lowrank_conv2d_amx(const LowrankConv2dArgs<Bfloat16>&) {}

#endif

}  // namespace lrc

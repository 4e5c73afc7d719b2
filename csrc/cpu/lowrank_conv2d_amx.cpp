#include "cpu/lowrank_conv2d_amx.h"

#include "cpu/simd.h"

namespace lrc {

#ifdef LRC_WITH_AMX

namespace {

using namespace tiled;

LRC_MULTIVERSION void pack(const ConvArgs& args, const Layout& layout, Factors& factors) {
    pack_factors(args, layout, factors);
}

LRC_MULTIVERSION void run(const ConvArgs& args, const Layout& layout, const Factors& factors,
                          std::int64_t task, const Scratch& scratch) {
    run_task<AmxTiles>(args, layout, factors, task, scratch);
}

struct AmxKernel {
    static constexpr auto pack = lrc::pack;
    static constexpr auto run = lrc::run;
};

}  // namespace

void lowrank_conv2d_amx(const LowrankConv2dArgs<Bfloat16>& args) { run_all<AmxKernel>(args); }

#else

void lowrank_conv2d_amx(const LowrankConv2dArgs<Bfloat16>&) {}

#endif

}  // namespace lrc

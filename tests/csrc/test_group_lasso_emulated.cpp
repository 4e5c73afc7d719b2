// FISTA's step on CUDA, emulated on the CPU, against the formulas written out.
#include "emulation/block.h"
#include "steps.h"

int main() {
    unsigned seed = 100;
    for (const steps::Case& shape : steps::cases()) {
        for (int iterations : {1, 5}) {
            std::vector<steps::Iterates> ends;
            for (emulation::Order order :
                 {emulation::Order::kForward, emulation::Order::kReverse, emulation::Order::kRandom}) {
                emulation::Block::instance().order = order;
                ends.push_back(
                    steps::expect_steps("emulated", lrc::Cuda{nullptr}, shape, iterations, 1, seed));
            }
            check::expect(ends[0] == ends[1] && ends[0] == ends[2], "the order of threads changes the bits");
            seed += 3;
        }
    }
    return check::failures > 0;
}

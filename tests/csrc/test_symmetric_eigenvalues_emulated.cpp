// The CUDA twin, emulated on the CPU, against known spectra and the CPU twin. An argument bounds the sides.
#include <cstdlib>
#include <cstring>

#include "emulation/block.h"
#include "spectra.h"

int main(int argc, char** argv) {
    const std::int64_t max_side = argc > 1 ? std::atoll(argv[1]) : lrc::kMaxCudaSide;
    const std::vector<spectra::Case> cases = spectra::small_cases(max_side);
    const spectra::Batch batch(cases);
    const std::vector<double> twin = batch.solve(lrc::Cpu{});
    emulation::Block& block = emulation::Block::instance();
    const std::vector<double> forward = batch.solve(lrc::Cuda{nullptr});
    spectra::expect_spectra("emulated", cases, batch, forward);
    for (std::size_t i = 0; i < cases.size(); ++i) {
        spectra::Case as_twin = cases[i];
        std::copy_n(&twin[batch.problems[i].value_offset], as_twin.side, as_twin.values.begin());
        const double difference = spectra::error_in_eps(as_twin, &forward[batch.problems[i].value_offset]);
        check::expect(difference <= 2 * spectra::error_bound_in_eps(as_twin.side),
                      "case %zu: the twins differ by %.1f eps", i, difference);
    }
    for (emulation::Order order : {emulation::Order::kReverse, emulation::Order::kRandom}) {
        block.order = order;
        const std::vector<double> values = batch.solve(lrc::Cuda{nullptr});
        check::expect(std::memcmp(values.data(), forward.data(), values.size() * sizeof(double)) == 0,
                      "a race: the order of the threads changes the result");
    }
    spectra::expect_nan_contained("emulated", lrc::Cuda{nullptr});
    return check::failures > 0;
}

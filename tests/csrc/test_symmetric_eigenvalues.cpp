// The CPU twin against known spectra.
#include <cstring>

#include "spectra.h"

int main() {
    const std::vector<spectra::Case> cases = [] {
        std::vector<spectra::Case> all = spectra::small_cases(257);
        // The delayed updates: several panels, and sides that are no multiple of a panel or a tile.
        for (std::int64_t side : {289, 311}) all.push_back(spectra::second_difference(side, side));
        return all;
    }();
    const spectra::Batch batch(cases);
    const std::vector<double> values = batch.solve(lrc::Cpu{});
    spectra::expect_spectra("one thread", cases, batch, values);
    for (int threads : {2, 3, 1000}) {
        const std::vector<double> again = batch.solve(lrc::Cpu{}, threads);
        check::expect(std::memcmp(values.data(), again.data(), values.size() * sizeof(double)) == 0,
                      "%d threads change the result", threads);
    }
    spectra::expect_nan_contained("cpu", lrc::Cpu{});
    check::expect(spectra::Batch({}).solve(lrc::Cpu{}).empty(), "no matrix has no values");
    return check::failures > 0;
}

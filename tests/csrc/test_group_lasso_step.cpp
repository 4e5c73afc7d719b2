// The CPU twin of FISTA's step against the formulas written out, for any number of threads.
#include "steps.h"

int main() {
    unsigned seed = 0;
    for (const steps::Case& shape : steps::cases()) {
        for (int iterations : {1, 2, 30}) {
            const auto one = steps::expect_steps("cpu", lrc::Cpu{}, shape, iterations, 1, seed);
            const auto other = steps::expect_steps("cpu", lrc::Cpu{}, shape, iterations, 3, seed);
            check::expect(one == other, "threads change the result");
            seed += 3;
        }
    }
    return check::failures > 0;
}

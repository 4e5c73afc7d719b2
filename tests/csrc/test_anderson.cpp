// Extrapolation against fixed points known beforehand.
#include <cstdint>
#include <vector>

#include "check.h"
#include "cpu/anderson.h"

namespace {

constexpr std::int64_t kOutputs = 8;
using Rows = std::vector<std::int64_t>;

// Each column shrinks its distance from the fixed point by a factor of its own.
std::vector<double> moved(const std::vector<double>& from, const std::vector<double>& limit) {
    const double factors[kOutputs] = {0.9, 0.9, 0.8, 0.8, 0.4, 0.4, 0.1, -0.2};
    std::vector<double> to(from);
    for (std::size_t i = 0; i < from.size(); ++i)
        to[i] = limit[i] + factors[i % kOutputs] * (from[i] - limit[i]);
    return to;
}

}  // namespace

int main() {
    const std::vector<double> limit = check::normal_vector(3 * kOutputs, 1);
    std::vector<double> iterate = check::normal_vector(3 * kOutputs, 2);
    lrc::Anderson anderson(kOutputs);
    int pushes = 1;
    while (!anderson.push(iterate.data(), Rows{0, 2})) {
        iterate = moved(iterate, limit);
        ++pushes;
    }
    check::expect(pushes == 6, "%d iterates for five moves", pushes);
    std::vector<double> combined(iterate);
    check::expect(anderson.combine(combined.data()), "nothing to combine");
    double before = 0, after = 0;
    for (std::size_t i = 0; i < limit.size(); ++i) {
        if (i / kOutputs == 1) {
            check::expect(combined[i] == iterate[i], "entry %zu is of no row that was pushed", i);
            continue;
        }
        before += (iterate[i] - limit[i]) * (iterate[i] - limit[i]);
        after += (combined[i] - limit[i]) * (combined[i] - limit[i]);
    }
    // One more move alone would leave four fifths.
    check::expect(after <= 0.25 * before, "squared distance %g after %g", after, before);
    anderson.restore(combined.data());
    check::expect(combined == iterate, "not restored");

    for (int i = 0; i < 5; ++i) anderson.push(iterate.data(), Rows{0, 2});
    check::expect(!anderson.push(iterate.data(), Rows{0}), "other rows do not begin anew");
    for (int i = 0; i < 5; ++i) anderson.push(iterate.data(), Rows{0});
    check::expect(!anderson.combine(combined.data()), "iterates that stand still were combined");
    anderson.clear();
    check::expect(!anderson.push(iterate.data(), Rows{}), "one iterate was enough");
    return check::failures > 0;
}

// The CUDA twin, emulated on the CPU: exact sums of small integers, and for float32 the bound that all of its
// pieces are needed for. An argument leaves out all but the cases that need every barrier.
#include <cmath>

#include "emulation/cuda_runtime.h"
#include "lowrank.h"
#include "patches.h"

namespace {

using emulation::Order;
using patches::Shape;

constexpr double kBefore = 0.5;  // no sum of integers
constexpr double kWorkspace = -12345.5;
constexpr int kLongestSum = 32;  // pixels whose products stay in float32, where entries are in pieces

double widen(float x) { return x; }
double widen(lrc::Bfloat16 x) { return lrc::to_float(x); }
double widen(lrc::Half x) { return lrc::to_float(x); }

template <class T> std::vector<T> images(std::int64_t size) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<T> x(size);
    for (T& value : x) {
        if constexpr (std::is_same_v<T, float>) {
            value = normal(random);
        } else {
            value = lowrank::round_to<T>(static_cast<double>(random() % 7) - 3);
        }
    }
    return x;
}

// A sum and the sum of its terms' magnitudes, for each entry of the result.
struct Exact {
    std::vector<double> values, sizes;
};

template <class T> Exact exact_products(const lrc::AutocorrelationArgs<T>& args, const Shape& shape) {
    const std::int64_t side = shape.channels * args.area;
    const std::int64_t rows = shape.out(shape.rows), columns = shape.out(shape.columns);
    Exact exact;
    exact.values.assign(shape.groups * side * side, 0);
    exact.sizes = exact.values;
    std::vector<double> entries(side);
    for (std::int64_t at = 0; at < shape.batch * shape.groups * rows * columns; ++at) {
        const std::int64_t place = at % (rows * columns), which = at / (rows * columns);
        const std::int64_t group = which % shape.groups;
        for (std::int64_t d = 0; d < side; ++d)
            entries[d] = widen(patches::entry(args, shape, which / shape.groups, group, place / columns,
                                              place % columns, d));
        for (std::int64_t d = 0; d < side; ++d) {
            for (std::int64_t e = 0; e < side; ++e) {
                const std::int64_t to = (group * side + d) * side + e;
                exact.values[to] += entries[d] * entries[e];
                exact.sizes[to] += std::fabs(entries[d] * entries[e]);
            }
        }
    }
    return exact;
}

// All offsets in two rounds, so that the second one begins behind some cells and windows.
template <class T>
void add_in_rounds(const lrc::AutocorrelationArgs<T>& args, std::int64_t splits,
                   std::vector<double>& workspace) {
    const lrc::PatchOffset* end = args.offsets + args.offset_count;
    const lrc::PatchOffset* middle = args.offsets + args.offset_count / 2;
    for (const auto& [first, last] : {std::pair{args.offsets, middle}, std::pair{middle, end}}) {
        if (first == last) continue;
        const lrc::PatchRound round{
            first->first_cell, (last - 1)->end_cell, first->first_window, (last - 1)->end_window, splits,
            workspace.data()};
        lrc::autocorrelation(lrc::Cuda{nullptr}, args, round);
    }
}

template <class T> void test(const Shape& shape, std::int64_t splits, bool channels_last = false) {
    const std::int64_t area = shape.kernel * shape.kernel, side = shape.channels * area;
    const std::int64_t image = shape.rows * shape.columns, all = shape.groups * shape.channels;
    const std::vector<T> x = images<T>(shape.batch * all * image);
    const patches::Tables tables = patches::make_tables(shape);
    lrc::AutocorrelationArgs<T> args = patches::arguments(shape, tables, x, channels_last);
    const Exact exact = exact_products(args, shape);
    const double unit = std::is_same_v<T, float> ? 0x1p-24 * std::min<double>(kLongestSum, image) : 0;
    for (Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
        emulation::Block::instance().order = order;
        std::vector<double> products(shape.groups * side * side, kBefore);
        const std::int64_t room =
            splits * tables.cells.size() * shape.groups * shape.channels * shape.channels;
        std::vector<double> workspace(room + 1, kWorkspace);
        args.products = products.data();
        add_in_rounds(args, splits, workspace);
        std::int64_t wrong = 0;
        for (std::int64_t at = 0; at < shape.groups * side * side; ++at) {
            const std::int64_t mirrored =
                at / side / side * side * side + at % side * side + at / side % side;
            const double error = std::fabs(products[at] - kBefore - exact.values[at]);
            wrong += !(error <= unit * exact.sizes[at] + 0x1p-52 * std::fabs(products[at]));
            wrong += products[at] != products[mirrored];
        }
        check::expect(wrong == 0, "%d bytes, %d channels, kernel %d, %d shares, order %d: %d wrong",
                      static_cast<int>(sizeof(T)), static_cast<int>(shape.channels),
                      static_cast<int>(shape.kernel), static_cast<int>(splits), static_cast<int>(order),
                      static_cast<int>(wrong));
        check::expect(workspace[room] == kWorkspace, "a write outside of the workspace");
    }
}

template <class T> void test_shapes() {
    test<T>({1, 1, 1, 1, 1, 1, 1, 0}, 1);
    test<T>({1, 1, 65, 1, 1, 1, 1, 0}, 2);
    test<T>({2, 1, 7, 4, 5, 2, 1, 1}, 2, true);
    test<T>({3, 2, 3, 5, 4, 2, 2, 1}, 1);
    test<T>({2, 1, 3, 3, 3, 3, 1, 1}, 1);
}

}  // namespace

int main(int argc, char**) {
    // Several chunks for all warps, and in bfloat16 sums that stay in the tensor cores for all and some of
    // them.
    test<float>({1, 1, 40, 1, 100, 1, 1, 0}, 1);
    test<lrc::Bfloat16>({1, 1, 64, 1, 230, 1, 1, 0}, 1, true);
    if (argc > 1) return check::failures > 0;
    for (std::int64_t columns : {31, 32, 33, 192, 193}) test<lrc::Half>({1, 1, 9, 1, columns, 1, 1, 0}, 3);
    test_shapes<float>();
    test_shapes<lrc::Bfloat16>();
    test_shapes<lrc::Half>();
    return check::failures > 0;
}

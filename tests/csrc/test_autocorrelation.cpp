// The CPU twin against exact sums of small integers, added to what was there.
#include "patches.h"

namespace {

using patches::Shape;
using patches::Tables;

constexpr double kBefore = 0.5;  // no sum of integers

template <class T> void run_case(const Shape& shape, bool channels_last, int threads) {
    const std::int64_t area = shape.kernel * shape.kernel, side = shape.channels * area;
    const std::int64_t image = shape.rows * shape.columns, all = shape.groups * shape.channels;
    std::mt19937 random(1);
    std::vector<T> x(shape.batch * all * image);
    for (T& value : x) value = static_cast<T>(random() % 7) - 3;
    std::vector<double> products(shape.groups * side * side, kBefore), sums(shape.groups * side, kBefore);
    const Tables tables = patches::make_tables(shape);
    lrc::AutocorrelationArgs<T> args = patches::arguments(shape, tables, x, channels_last);
    args.products = products.data();
    args.sums = sums.data();
    args.threads = threads;
    lrc::autocorrelation(lrc::Cpu{}, args);
    std::vector<double> exact(products.size(), kBefore), exact_sums(sums.size(), kBefore);
    for (std::int64_t at = 0; at < shape.batch * shape.groups; ++at) {
        for (std::int64_t place = 0; place < shape.out(shape.rows) * shape.out(shape.columns); ++place) {
            std::vector<double> entries(side);
            const std::int64_t group = at % shape.groups;
            for (std::int64_t d = 0; d < side; ++d) {
                entries[d] =
                    patches::entry(args, shape, at / shape.groups, group, place / shape.out(shape.columns),
                                   place % shape.out(shape.columns), d);
                exact_sums[group * side + d] += entries[d];
            }
            for (std::int64_t d = 0; d < side; ++d) {
                for (std::int64_t e = 0; e < side; ++e)
                    exact[(group * side + d) * side + e] += entries[d] * entries[e];
            }
        }
    }
    check::expect(products == exact && sums == exact_sums, "%d bytes, %d channels, kernel %d, stride %d",
                  static_cast<int>(sizeof(T)), static_cast<int>(shape.channels),
                  static_cast<int>(shape.kernel), static_cast<int>(shape.stride));
}

}  // namespace

int main() {
    const Shape shapes[] = {
        {1, 1, 1, 1, 1, 1, 1, 0},  {2, 1, 3, 5, 4, 3, 1, 1},    {3, 2, 17, 4, 5, 3, 2, 1},
        {1, 1, 33, 3, 3, 2, 1, 0}, {2, 3, 8, 7, 6, 3, 1, 2},    {1, 1, 2, 1, 401, 1, 1, 0},
        {1, 1, 16, 2, 2, 3, 1, 3}, {1, 1, 40, 20, 20, 1, 1, 0}, {1, 1, 5, 8, 7, 7, 1, 3}};
    for (const Shape& shape : shapes) {
        for (const int threads : {1, 3}) {
            run_case<float>(shape, false, threads);
            run_case<double>(shape, true, threads);
        }
    }
    return check::failures != 0;
}

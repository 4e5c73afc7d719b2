// The CUDA twin, emulated on the CPU, against exact products of integers. An argument bounds the sides.
#include <cstdlib>

#include "emulation/block.h"
#include "products.h"

namespace {

template <class T> void test(std::int64_t max_side) {
    const std::vector<products::Case<T>> cases = products::small_cases<T>(max_side);
    for (emulation::Order order :
         {emulation::Order::kForward, emulation::Order::kReverse, emulation::Order::kRandom}) {
        emulation::Block::instance().order = order;
        products::expect_products("emulated", cases, products::multiply(lrc::Cuda{nullptr}, cases));
    }
    check::expect(products::multiply<T>(lrc::Cuda{nullptr}, {}).empty(), "no matrix has no product");
}

}  // namespace

int main(int argc, char** argv) {
    const std::int64_t max_side = argc > 1 ? std::atoll(argv[1]) : 97;
    test<float>(max_side);
    test<double>(max_side);
    return check::failures > 0;
}

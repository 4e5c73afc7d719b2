// The CPU twin against exact products of integers.
#include "products.h"

namespace {

template <class T> void test() {
    const std::vector<products::Case<T>> cases = products::small_cases<T>(205);
    for (int threads : {1, 2, 3, 1000}) {
        products::expect_products("cpu", cases, products::multiply(lrc::Cpu{}, cases, threads));
    }
    check::expect(products::multiply<T>(lrc::Cpu{}, {}).empty(), "no matrix has no product");
}

}  // namespace

int main() {
    test<float>();
    test<double>();
    return check::failures > 0;
}

// What the CPU twin multiplies beside the factors is zero, whatever memory held before.
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "check.h"
#include "cpu/lowrank_conv2d_weights.h"

// Memory that holds denormal numbers.
[[gnu::noinline]] void* operator new(std::size_t size) {
    void* p = std::malloc(size);
    if (p == nullptr) throw std::bad_alloc();
    for (std::size_t i = 0; i < size; ++i) static_cast<unsigned char*>(p)[i] = i % 4 == 0;
    return p;
}
[[gnu::noinline]] void* operator new[](std::size_t size) { return operator new(size); }
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete[](void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete[](void* p, std::size_t) noexcept { std::free(p); }

int main() {
    constexpr std::int64_t kInner = 3;
    const lrc::ConvAxis axis{5, 5, 3, 1, 1, 1};
    for (std::int64_t width : {8, 16}) {
        for (std::int64_t filters : {1, 7, 8, 16, 33, 64}) {
            const std::vector<float> encoder(kInner * 9, 1.0F), decoder(filters * kInner, 2.0F);
            lrc::LowrankConv2dArgs<float> args{};
            args.encoder = encoder.data();
            args.decoder = decoder.data();
            args.channels_last = true;
            args.channels = args.groups = 1;
            args.filters = filters;
            args.rank = kInner;
            args.rows = args.columns = axis;
            lrc::PackedWeights packed;
            lrc::pack_weights(args, width, packed);
            const std::int64_t pair = 2 * width, all = (filters + pair - 1) / pair * pair;
            int wrong = 0;
            for (std::int64_t f = 0; f < all; ++f) {
                for (std::int64_t m = 0; m < kInner; ++m) {
                    const float found =
                        packed.weights.decoder[f / pair * pair * kInner + m * pair + f % pair];
                    wrong += found != (f < filters ? 2.0F : 0.0F);
                }
            }
            check::expect(wrong == 0, "%lld filters in vectors of %lld: %d wrong",
                          static_cast<long long>(filters), static_cast<long long>(width), wrong);
        }
    }
    return check::failures > 0;
}

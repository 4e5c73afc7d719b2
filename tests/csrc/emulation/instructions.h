// The twins of the functions in csrc/cuda/ptx.cuh.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "block.h"

namespace emulation {

inline float half_to_float(std::uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline std::uint16_t float_to_half(float x) { return std::bit_cast<std::uint16_t>(static_cast<_Float16>(x)); }

inline void expect_aligned(const void* address) {
    if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) fail("16 bytes that are not aligned");
}

// The 16-bit entry of a register that holds two.
inline std::uint16_t half_of(std::uint32_t word, unsigned which) {
    return static_cast<std::uint16_t>(word >> 16 * (which % 2));
}

inline std::array<std::uint32_t, 4> load_matrices(const void* row) {
    expect_aligned(row);
    Block& block = Block::instance();
    const unsigned lane = block.lane();
    const auto rows = block.exchange(row);
    std::array<std::uint32_t, 4> result;
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
        const auto* from = static_cast<const unsigned char*>(rows(8 * matrix + lane / 4)) + 4 * (lane % 4);
        std::memcpy(&result[matrix], from, sizeof result[matrix]);
    }
    return result;
}

// The terms are added in ascending order, in float32; a tensor core adds them in an order of its own.
template <class Convert>
void multiply_add(float (&sums)[4], const std::uint32_t (&fragments)[6], const Convert& to_float) {
    Block& block = Block::instance();
    const unsigned lane = block.lane();
    const auto all = block.exchange(std::to_array(fragments));
    for (unsigned entry = 0; entry < 4; ++entry) {
        const unsigned row = lane / 4 + 8 * (entry / 2);
        const unsigned column = 2 * (lane % 4) + entry % 2;
        for (unsigned k = 0; k < 16; ++k) {
            const auto& a = all(row % 8 * 4 + k % 8 / 2);
            const auto& b = all(column * 4 + k % 8 / 2);
            sums[entry] +=
                to_float(half_of(a[row / 8 + 2 * (k / 8)], k)) * to_float(half_of(b[4 + k / 8], k));
        }
    }
}

// The terms are added four at a time, each sum cut off toward zero: a model of tensor cores, whose own widths
// differ.
inline void multiply_add_tf32(float (&sums)[4], const std::array<std::uint32_t, 6>& fragments) {
    Block& block = Block::instance();
    const unsigned lane = block.lane();
    const auto all = block.exchange(fragments);
    const auto entry_of = [](std::uint32_t word) { return std::bit_cast<float>(word >> 13 << 13); };
    for (unsigned entry = 0; entry < 4; ++entry) {
        const unsigned row = lane / 4 + 8 * (entry / 2);
        const unsigned column = 2 * (lane % 4) + entry % 2;
        for (unsigned half = 0; half < 2; ++half) {
            double sum = sums[entry];
            for (unsigned k = 0; k < 4; ++k) {
                const double a = entry_of(all(row % 8 * 4 + k)[row / 8 + 2 * half]);
                sum += a * entry_of(all(column * 4 + k)[4 + half]);
            }
            const auto nearest = static_cast<float>(sum);
            sums[entry] = std::fabs(nearest) > std::fabs(sum) ? std::nextafter(nearest, 0.0F) : nearest;
        }
    }
}

// A copy lands when it is begun or when it is waited for: a kernel must give the same bits either way.
enum class Landing { kAtOnce, kWhenWaitedFor };

struct Copies {
    struct Copy {
        void* to;
        std::array<unsigned char, 16> bytes;
    };
    Landing landing = Landing::kAtOnce;
    std::vector<std::deque<std::vector<Copy>>> groups;  // of each thread, the last one open

    static Copies& instance() {
        static Copies copies;
        return copies;
    }
    std::deque<std::vector<Copy>>& mine() {
        const unsigned thread = Block::instance().thread();
        if (groups.size() <= thread) groups.resize(thread + 1);
        if (groups[thread].empty()) groups[thread].emplace_back();
        return groups[thread];
    }
};

inline void copy_async(void* to, const void* from, bool readable) {
    expect_aligned(to);
    expect_aligned(from);
    Copies::Copy copy{to, {}};
    if (readable) std::memcpy(copy.bytes.data(), from, copy.bytes.size());
    if (Copies::instance().landing == Landing::kAtOnce) {
        std::memcpy(to, copy.bytes.data(), copy.bytes.size());
    } else {
        Copies::instance().mine().back().push_back(copy);
    }
}

inline void commit_copies() { Copies::instance().mine().emplace_back(); }

template <int kPending> void wait_for_copies() {
    auto& groups = Copies::instance().mine();
    while (groups.size() > kPending + 1) {
        for (const Copies::Copy& copy : groups.front())
            std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
        groups.pop_front();
    }
}

// Grids run one after another here.
inline void let_next_grid_start() {}
inline void wait_for_last_grid() {}

}  // namespace emulation

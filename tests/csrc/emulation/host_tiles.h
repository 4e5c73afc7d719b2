// The twin of AmxTiles (csrc/cpu/amx.h), and what makes its very instructions run on a processor without
// them.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/amx.h"

namespace emulation {

[[noreturn]] inline void stop(const char* message) {
    std::fprintf(stderr, "AMX: %s\n", message);
    std::_Exit(1);
}

// Eight tiles and their shapes. Sums are in the order of Intel's manual (volume 2, TDPBF16PS) and rounded as
// there, but denormal numbers are kept, which the processor takes for zeros.
class HostTiles {
  public:
    void configure(const lrc::TileConfig& config) {
        config_ = config;
        for (int tile = 0; tile < 16; ++tile) {
            const bool used = config.rows[tile] > 0;
            if (used != (config.row_bytes[tile] > 0)) stop("a tile of rows without bytes, or the reverse");
            if (used && tile >= kTiles) stop("a tile above 7 has a shape");
            if (config.rows[tile] > kRows || config.row_bytes[tile] > kBytes) stop("a tile is too large");
        }
        if (config.palette != 1 || config.start_row != 0) stop("not palette 1 from row 0 on");
        std::memset(bytes_, 0, sizeof bytes_);
    }
    void release() { config_ = {.palette = 0}; }

    void zero(int tile) {
        check(tile);
        std::memset(bytes_[tile], 0, sizeof bytes_[tile]);
    }
    void load(int tile, const void* from, std::int64_t stride) {
        zero(tile);
        for (std::int64_t row = 0; row < config_.rows[tile]; ++row) {
            const char* begin = static_cast<const char*>(from) + row * stride;
            std::memcpy(bytes_[tile][row], begin, config_.row_bytes[tile]);
        }
    }
    void store(int tile, void* to, std::int64_t stride) {
        check(tile);
        for (std::int64_t row = 0; row < config_.rows[tile]; ++row)
            std::memcpy(static_cast<char*>(to) + row * stride, bytes_[tile][row], config_.row_bytes[tile]);
    }
    void multiply(int c, int a, int b) {
        check(a);
        check(b);
        check(c);
        if (config_.rows[c] != config_.rows[a] || config_.row_bytes[c] != config_.row_bytes[b] ||
            config_.row_bytes[a] != 4 * config_.rows[b])
            stop("a product of tiles that do not fit");
        for (int m = 0; m < config_.rows[c]; ++m) {
            for (int n = 0; n < config_.row_bytes[c] / 4; ++n) {
                float even = 0, odd = 0;
                for (int k = 0; k < config_.rows[b]; ++k) {
                    // A product of two bfloat16 is exact.
                    even += entry(a, m, 2 * k) * entry(b, k, 2 * n);
                    odd += entry(a, m, 2 * k + 1) * entry(b, k, 2 * n + 1);
                }
                float sum;
                std::memcpy(&sum, bytes_[c][m] + 4 * n, 4);
                sum += even + odd;
                std::memcpy(bytes_[c][m] + 4 * n, &sum, 4);
            }
        }
    }

    template <int kTile> void zero() { zero(kTile); }
    template <int kTile> void load(const lrc::Bfloat16* from, std::int64_t stride) {
        load(kTile, from, stride);
    }
    template <int kTile> void store(float* to, std::int64_t stride) { store(kTile, to, stride); }
    template <int kC, int kA, int kB> void multiply() { multiply(kC, kA, kB); }

  private:
    static constexpr int kTiles = 8, kRows = 16, kBytes = 64;

    void check(int tile) const {
        if (config_.palette == 0) stop("tiles without a shape");
        if (config_.rows[tile] == 0) stop("a tile without a shape");
    }
    float entry(int tile, int row, int column) const {
        lrc::Bfloat16 x;
        std::memcpy(&x, bytes_[tile][row] + 2 * column, 2);
        return lrc::to_float(x);
    }

    lrc::TileConfig config_{.palette = 0};
    std::uint8_t bytes_[kTiles][kRows][kBytes] = {};
};

#ifdef LRC_WITH_AMX

// One AMX instruction, as a processor reads it.
struct AmxInstruction {
    int prefix;  // 0 none, 2 F3, 3 F2
    int opcode;
    bool of_registers;
    int reg, rm, vector;
    std::uint64_t base;   // address, where it has one
    std::int64_t stride;  // the index register
    std::int64_t length;
};

inline std::uint64_t register_of(const ucontext_t& context, int number) {
    constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return static_cast<std::uint64_t>(context.uc_mcontext.gregs[kOrder[number]]);
}

inline AmxInstruction decode(const ucontext_t& context) {
    const std::uint64_t begin = static_cast<std::uint64_t>(context.uc_mcontext.gregs[REG_RIP]);
    const auto* code = reinterpret_cast<const std::uint8_t*>(begin);
    if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x84) != 0) stop("not an instruction of AMX");
    const int x = code[1] & 0x40 ? 0 : 8, b = code[1] & 0x20 ? 0 : 8;
    const int mode = code[4] >> 6;
    AmxInstruction found{.prefix = code[2] & 3,
                         .opcode = code[3],
                         .of_registers = mode == 3,
                         .reg = code[4] >> 3 & 7,
                         .rm = code[4] & 7,
                         .vector = ~code[2] >> 3 & 15,
                         .base = 0,
                         .stride = 0,
                         .length = 5};
    if (found.of_registers) return found;
    int base = found.rm;
    if (found.rm == 4) {
        const int sib = code[found.length++], index = (sib >> 3 & 7) + x;
        base = sib & 7;
        if (index != 4) found.stride = static_cast<std::int64_t>(register_of(context, index) << (sib >> 6));
    }
    if (mode == 0 && base == 5) stop("an address without a base");
    found.base = register_of(context, base + b);
    if (mode == 1) found.base += static_cast<std::int64_t>(static_cast<std::int8_t>(code[found.length++]));
    if (mode == 2) {
        std::int32_t offset;
        std::memcpy(&offset, code + found.length, 4);
        found.base += static_cast<std::int64_t>(offset);
        found.length += 4;
    }
    return found;
}

inline void carry_out(int, siginfo_t*, void* raw) {
    thread_local HostTiles tiles;
    auto& context = *static_cast<ucontext_t*>(raw);
    const AmxInstruction found = decode(context);
    auto* address = reinterpret_cast<void*>(found.base);
    switch (found.opcode << 4 | found.prefix << 1 | found.of_registers) {
        case 0x490:
            tiles.configure(*static_cast<const lrc::TileConfig*>(address));
            break;
        case 0x491:
            tiles.release();
            break;
        case 0x497:
            tiles.zero(found.reg);
            break;
        case 0x4B6:
            tiles.load(found.reg, address, found.stride);
            break;
        case 0x4B4:
            tiles.store(found.reg, address, found.stride);
            break;
        case 0x5C5:
            tiles.multiply(found.reg, found.rm, found.vector);
            break;
        default:
            stop("an unknown instruction");
    }
    context.uc_mcontext.gregs[REG_RIP] += found.length;
}

// From here on AMX instructions work, on this processor or in its place.
inline void provide_amx() {
    if (lrc::has_amx()) return;
    struct sigaction action{};
    action.sa_sigaction = carry_out;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
}

#endif

}  // namespace emulation

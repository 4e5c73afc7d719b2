// A CUDA block on the CPU: a fiber a thread, which runs from barrier to barrier.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "fibers.h"

namespace emulation {

// In which order threads and warps run between two barriers. A kernel without races gives the same bits in
// all.
enum class Order { kForward, kReverse, kRandom };

inline constexpr std::size_t kMaxSharedBytes = 227 << 10;  // of an sm_90 block
inline constexpr unsigned char kPoison = 0xcb;
inline constexpr unsigned kWarp = 32;
inline constexpr std::size_t kMaxExchangeBytes = 24;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulated kernel: %s\n", what);
    std::exit(1);
}

class Block {
  public:
    Order order = Order::kForward;
    std::mt19937 random{0};

    // Runs body() once for each of `threads` threads; set_thread(i) is called before thread i continues.
    void run(unsigned threads, const std::function<void()>& body,
             const std::function<void(unsigned)>& set_thread) {
        while (fibers_.size() < threads) fibers_.emplace_back();
        body_ = &body;
        states_.assign(threads, State::kRunning);
        exchanges_.assign(threads, 0);
        exchanged_.assign((threads + kWarp - 1) / kWarp, {});
        for (unsigned i = 0; i < threads; ++i) fibers_[i].start(&Block::entry);
        set_thread_ = &set_thread;
        const unsigned warps = (threads + kWarp - 1) / kWarp;
        do {
            // A warp runs as far as it can before the next one starts: what lies between two block barriers
            // is as much apart in time as it can be.
            for (unsigned warp : sequence(0, warps))
                run_warp(warp * kWarp, std::min((warp + 1) * kWarp, threads));
        } while (release_block());
    }

    void block_barrier() { wait(State::kAtBlockBarrier); }
    void warp_barrier() { wait(State::kAtWarpBarrier); }

    unsigned thread() const { return current_; }
    unsigned lane() const { return current_ % kWarp; }

    // What each lane of this thread's warp passes, by lane: to be read before the thread's next barrier.
    template <class T> auto exchange(const T& value) {
        static_assert(sizeof(T) <= kMaxExchangeBytes);
        auto& lanes = exchanged_[current_ / kWarp].lanes[exchanges_[current_]++ % 2];
        std::memcpy(lanes[lane()], &value, sizeof value);
        warp_barrier();
        return [&lanes](unsigned source) {
            T result;
            std::memcpy(&result, lanes[source % kWarp], sizeof result);
            return result;
        };
    }

    // The value that lane `source` of this thread's warp passes.
    template <class T> T shuffle(T value, unsigned source) { return exchange(value)(source); }

    static Block& instance() {
        static Block block;
        return block;
    }

  private:
    enum class State { kRunning, kAtBlockBarrier, kAtWarpBarrier, kDone };
    // Two sets, used in turn: a lane may pass its next value while others still read the last ones.
    struct Warp {
        unsigned char lanes[2][kWarp][kMaxExchangeBytes];
    };

    static void entry() {
        Block& block = instance();
        Fiber& fiber = block.fibers_[block.current_];
        fiber.arrive();
        (*block.body_)();
        block.states_[block.current_] = State::kDone;
        fiber.pause();
    }

    void wait(State barrier) {
        const unsigned self = current_;
        states_[self] = barrier;
        fibers_[self].pause();
    }

    bool all(unsigned begin, unsigned end, State state) const {
        return std::all_of(states_.begin() + begin, states_.begin() + end,
                           [&](State s) { return s == state; });
    }

    // The numbers begin..end-1 in the order that is being tried.
    std::vector<unsigned> sequence(unsigned begin, unsigned end) {
        std::vector<unsigned> numbers(end - begin);
        std::iota(numbers.begin(), numbers.end(), begin);
        if (order == Order::kReverse) std::reverse(numbers.begin(), numbers.end());
        if (order == Order::kRandom) std::shuffle(numbers.begin(), numbers.end(), random);
        return numbers;
    }

    // Runs the warp's threads until none of them can go on without the other warps.
    void run_warp(unsigned begin, unsigned end) {
        while (true) {
            for (unsigned i : sequence(begin, end)) {
                if (states_[i] != State::kRunning) continue;
                current_ = i;
                (*set_thread_)(i);
                fibers_[i].resume();
            }
            if (!all(begin, end, State::kAtWarpBarrier)) return;
            std::fill(states_.begin() + begin, states_.begin() + end, State::kRunning);
        }
    }

    // Lets the threads through the block barrier; false when all are done.
    bool release_block() {
        const auto threads = static_cast<unsigned>(states_.size());
        if (all(0, threads, State::kDone)) return false;
        if (!all(0, threads, State::kAtBlockBarrier)) {
            fail("some threads wait at a barrier that the others never reach");
        }
        std::fill(states_.begin(), states_.end(), State::kRunning);
        return true;
    }

    std::deque<Fiber> fibers_;
    std::vector<State> states_;
    std::vector<unsigned> exchanges_;
    std::vector<Warp> exchanged_;
    const std::function<void()>* body_ = nullptr;
    const std::function<void(unsigned)>* set_thread_ = nullptr;
    unsigned current_ = 0;
};

}  // namespace emulation

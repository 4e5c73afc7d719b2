// The one parallel loop of the CPU twins.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#else
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace lrc {

// How many workers `parallel_for` uses: no more than there is work.
inline int worker_count(int threads, std::int64_t count) {
    return static_cast<int>(std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(count, 1)));
}

// Calls body(worker, index) once for each index in [0, count), handed out one by one, lowest first. `worker`
// is in [0, worker_count(threads, count)) and owned by one thread at a time. The body must not throw: no
// exception may leave a parallel region, so what can fail (an allocation) belongs before the loop.
template <class Body> void parallel_for(int threads, std::int64_t count, const Body& body) {
    static_assert(noexcept(body(0, std::int64_t{0})), "mark the body noexcept");
    const int workers = worker_count(threads, count);
    if (workers == 1) {
        for (std::int64_t index = 0; index < count; ++index) body(0, index);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel for num_threads(workers) schedule(dynamic, 1)
    for (std::int64_t index = 0; index < count; ++index) body(omp_get_thread_num(), index);
#else
    std::atomic<std::int64_t> next{0};
    const auto work = [&](int worker) {
        for (std::int64_t index; (index = next++) < count;) body(worker, index);
    };
    std::vector<std::jthread> pool;
    for (int worker = 1; worker < workers; ++worker) pool.emplace_back(work, worker);
    work(0);
#endif
}

}  // namespace lrc

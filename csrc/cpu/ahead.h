// Memory that is wanted soon, fetched a few cache lines at a time beside other work.
#pragma once

#include <cstdint>

#include "device.h"

namespace lrc {

class Ahead {
  public:
    struct Bytes {
        const void* first;
        std::int64_t size;
    };

    Ahead() = default;  // nothing
    // What will be read and what will be written, in `calls` calls of fetch().
    LRC_INLINE Ahead(Bytes read, Bytes written, std::int64_t calls)
        : read_(read, calls), written_(written, calls) {}

    LRC_INLINE void fetch() {
        read_.fetch();
        written_.fetch();
    }

  private:
    struct Lines {
        static constexpr std::int64_t kSize = 64;  // bytes of a cache line

        Lines() = default;
        LRC_INLINE Lines(Bytes bytes, std::int64_t calls)
            : next(static_cast<const char*>(bytes.first)),
              left(bytes.size),
              step((bytes.size / kSize / (calls > 0 ? calls : 1) + 1) * kSize) {}

        LRC_INLINE void fetch() {
            const char* stop = next + (left < step ? left : step);
            left -= stop - next;
            for (; next < stop; next += kSize) __builtin_prefetch(next, 0, 2);
            next = stop;
        }

        const char* next = nullptr;
        std::int64_t left = 0;
        std::int64_t step = 0;  // bytes of a call
    };

    Lines read_, written_;
};

}  // namespace lrc

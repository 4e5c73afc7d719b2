// What a CPU twin makes of a layer's factors, kept from call to call. It is made again where the factors are
// not, byte by byte, those it was made of: so nobody has to say that they changed, and comparing takes a
// fraction of making.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

namespace lrc {

class PackedFactors {
  public:
    using Bytes = std::span<const std::byte>;
    // Numbers that tell the types and layouts of what is made apart.
    using Key = std::vector<std::int64_t>;

    // What make() returns for these sources, or returned for equal ones and the same key the last time. Any
    // thread may call at any time.
    template <class Made, class Make>
    std::shared_ptr<const Made> get(const Key& key, const std::array<Bytes, 3>& sources, const Make& make) {
        std::shared_ptr<const Kept> kept = exchange(nullptr);
        if (kept == nullptr || kept->key != key || !equal(*kept, sources)) {
            auto fresh = std::make_shared<Kept>();
            fresh->key = key;
            for (std::size_t i = 0; i < sources.size(); ++i)
                fresh->sources[i].assign(sources[i].begin(), sources[i].end());
            fresh->made = make();
            exchange(fresh);
            kept = std::move(fresh);
        }
        return std::static_pointer_cast<const Made>(kept->made);
    }

  private:
    struct Kept {
        Key key;
        std::array<std::vector<std::byte>, 3> sources;
        std::shared_ptr<const void> made;
    };

    static bool equal(const Kept& kept, const std::array<Bytes, 3>& sources) {
        for (std::size_t i = 0; i < sources.size(); ++i) {
            const std::vector<std::byte>& mine = kept.sources[i];
            if (mine.size() != sources[i].size()) return false;
            if (!mine.empty() && std::memcmp(mine.data(), sources[i].data(), mine.size()) != 0) return false;
        }
        return true;
    }

    // What is kept, after `fresh`, if any, has taken its place.
    std::shared_ptr<const Kept> exchange(std::shared_ptr<const Kept> fresh) {
        const std::lock_guard lock(mutex_);
        if (fresh != nullptr) kept_ = std::move(fresh);
        return kept_;
    }

    std::mutex mutex_;
    std::shared_ptr<const Kept> kept_;
};

}  // namespace lrc

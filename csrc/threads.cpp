// Tasks are handed out one by one, so that a thread that another program holds up takes fewer. A job is open while
// tasks may be left: helpers enter it, and the caller closes it and waits only for those that did, so that it never
// waits for one that is still waking up.
#include "threads.hpp"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace sparse_bitnet {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);  // the time between two layers of a model, and not much more
constexpr std::uint32_t kClosed = 1u << 31;
constexpr int kLimitShift = 16, kMostThreads = 1024;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether `done` came true within kSpin.
template <class Done>
bool spin(Done done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 64; ++i) {
            if (done()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

class Pool {
  public:
    void run(int threads, std::size_t tasks, void (*task)(const void*, std::size_t), const void* context) {
        grow(threads - 1);
        task_ = task, context_ = context, tasks_ = tasks;
        next_.store(0, std::memory_order_relaxed);
        state_.store(static_cast<std::uint32_t>(threads - 1) << kLimitShift, std::memory_order_release);
        jobs_.fetch_add(1);
        if (sleepers_.load() > 0) {
            { const std::lock_guard<std::mutex> lock(sleep_); }
            wake_.notify_all();
        }
        work();
        state_.fetch_or(kClosed);
        const auto all_left = [this] { return (state_.load(std::memory_order_acquire) & 0xffff) == 0; };
        while (!spin(all_left)) std::this_thread::yield();
        if (failed_.exchange(false)) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

    std::mutex busy;

  private:
    void grow(int helpers) {
        for (; helpers_ < helpers; ++helpers_) {
            try {
                std::thread([this] { help(); }).detach();
            } catch (const std::system_error&) {
                return;  // no more threads to be had: fewer share the tasks
            }
        }
    }

    // The first exception is the caller's to throw, when nobody is in its tasks any more; no further ones begin.
    void work() {
        try {
            for (std::size_t index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;)
                task_(context_, index);
        } catch (...) {
            next_.store(tasks_, std::memory_order_relaxed);
            if (!failed_.exchange(true)) failure_ = std::current_exception();
        }
    }

    void help() {
        std::uint64_t seen = 0;
        for (;;) {
            const auto called = [this, &seen] { return jobs_.load() != seen; };
            if (!spin(called)) {
                std::unique_lock<std::mutex> lock(sleep_);
                sleepers_.fetch_add(1);
                wake_.wait(lock, called);
                sleepers_.fetch_sub(1);
            }
            seen = jobs_.load();
            if (enter()) {
                work();
                state_.fetch_sub(1, std::memory_order_release);
            }
        }
    }

    bool enter() {
        std::uint32_t state = state_.load();
        while (!(state & kClosed) && (state & 0xffff) < (state >> kLimitShift))
            if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) return true;
        return false;
    }

    void (*task_)(const void*, std::size_t) = nullptr;
    const void* context_ = nullptr;
    std::size_t tasks_ = 0;
    int helpers_ = 0;
    alignas(64) std::atomic<std::size_t> next_{0};
    alignas(64) std::atomic<std::uint32_t> state_{kClosed};  // closed, limit of helpers, helpers inside
    alignas(64) std::atomic<std::uint64_t> jobs_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> failed_{false};
    std::exception_ptr failure_;
    std::mutex sleep_;
    std::condition_variable wake_;
};

// Never destroyed: helpers may outlive main(). A child process has none of them, and gets a new pool.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool.store(new Pool);
        pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
    });
    return *pool.load();
}

}  // namespace

void run_tasks(int threads, std::size_t tasks, void (*task)(const void*, std::size_t), const void* context) {
    if (static_cast<std::size_t>(threads) > tasks) threads = static_cast<int>(tasks);
    if (threads > kMostThreads) threads = kMostThreads;
    if (threads > 1) {
        Pool& shared = the_pool();
        const std::unique_lock<std::mutex> lock(shared.busy, std::try_to_lock);
        if (lock.owns_lock()) return shared.run(threads, tasks, task, context);
    }
    for (std::size_t index = 0; index < tasks; ++index) task(context, index);
}

}  // namespace sparse_bitnet

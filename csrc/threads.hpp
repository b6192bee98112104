// Threads that share the tasks of one call: the caller and helpers that sleep between calls.
#pragma once

#include <cstddef>

namespace sparse_bitnet {

// Runs task(context, index) for each index below `tasks` on up to `threads` threads, the caller among them, and comes
// back when all are done, or throws what a task threw, when none runs any more. A call from another thread meanwhile runs
// on that thread alone, as does one after a fork.
void run_tasks(int threads, std::size_t tasks, void (*task)(const void* context, std::size_t index),
               const void* context);

template <class Task>
void run_tasks(int threads, std::size_t tasks, const Task& task) {
    const auto call = [](const void* context, std::size_t index) { (*static_cast<const Task*>(context))(index); };
    run_tasks(threads, tasks, call, &task);
}

}  // namespace sparse_bitnet

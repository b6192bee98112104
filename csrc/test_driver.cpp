// Every kernel of this machine on random problems, against loops that do what formats and numerics say. Built without
// Python for AddressSanitizer, UndefinedBehaviorSanitizer and emulators; weights and activations end where their memory
// ends, so that a read beyond it is seen.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "packed_linear.hpp"
#include "threads.hpp"

using namespace sparse_bitnet;

namespace {

std::mt19937 generator(0);

int random_below(int end) { return static_cast<int>(generator() % static_cast<unsigned>(end)); }

struct Case {
    Format format;
    std::size_t rows, in_features, tokens;
    bool int4, with_bias, with_parts, extreme;
};

std::size_t bytes_per_row(Format format, std::size_t in_features) {
    switch (format) {
        case Format::i2: return (in_features + 3) / 4;
        case Format::t5: return (in_features + 4) / 5;
        case Format::g4: return (in_features / 4 * 6 + 7) / 8;
        default: return (in_features / 4 * 5 + 7) / 8;
    }
}

// A random row: packed into `bytes`, and as codes -1, 0, 1.
void fill_row(Format format, std::size_t in_features, std::uint8_t* bytes, int* codes) {
    const std::size_t count = bytes_per_row(format, in_features);
    std::memset(bytes, 0, count);
    if (format == Format::i2) {
        for (std::size_t i = 0; i < count * 4; ++i) {
            const int digit = i < in_features ? random_below(3) : 1;
            bytes[i / 4] |= static_cast<std::uint8_t>(digit << (2 * (i % 4)));
            if (i < in_features) codes[i] = digit - 1;
        }
    } else if (format == Format::t5) {
        const int powers[] = {1, 3, 9, 27, 81};
        for (std::size_t i = 0; i < count * 5; ++i) {
            const int digit = i < in_features ? random_below(3) : 1;
            bytes[i / 5] = static_cast<std::uint8_t>(bytes[i / 5] + digit * powers[i % 5]);
            if (i < in_features) codes[i] = digit - 1;
        }
    } else {
        const int bits = format == Format::g4 ? 6 : 5;
        const int entries = format == Format::g4 ? 33 : format == Format::g4s2 ? 24 : 32;
        for (std::size_t group = 0; group < in_features / 4; ++group) {
            const int number = random_below(entries);
            for (int bit = 0; bit < bits; ++bit)
                if (number >> bit & 1)
                    bytes[(group * bits + bit) / 8] |= static_cast<std::uint8_t>(1 << ((group * bits + bit) % 8));
            for (int i = 0; i < 4; ++i) codes[4 * group + i] = (codebook(format)[number] >> (2 * i) & 3) - 1;
        }
    }
}

bool is_right(const Kernel& kernel, const Case& one, int threads) {
    const std::size_t width = bytes_per_row(one.format, one.in_features);
    std::unique_ptr<std::uint8_t[]> weight(new std::uint8_t[one.rows * width]);
    std::vector<int> codes(one.rows * one.in_features);
    for (std::size_t row = 0; row < one.rows; ++row)
        fill_row(one.format, one.in_features, weight.get() + row * width, codes.data() + row * one.in_features);
    std::unique_ptr<float[]> x(new float[one.tokens * one.in_features]), y(new float[one.tokens * one.rows]);
    for (std::size_t i = 0; i < one.tokens * one.in_features; ++i)
        x[i] = one.extreme ? (random_below(2) ? 1.0f : -1.0f) : static_cast<float>(random_below(20001) - 10000) / 999;
    std::vector<float> scale{0.37f}, row_scale(one.rows), bias(one.rows);
    for (std::size_t row = 0; row < one.rows; ++row) {
        row_scale[row] = one.with_parts ? 0.1f * static_cast<float>(1 + row % 3) : scale[0];
        bias[row] = static_cast<float>(row) - 3.5f;
    }
    const Problem problem{{weight.get(), one.rows, one.in_features, width, one.format},
                          x.get(), Dtype::f32, one.tokens, one.int4, scale.data(),
                          one.with_parts ? row_scale.data() : nullptr, one.with_bias ? bias.data() : nullptr,
                          Dtype::f32, y.get()};
    packed_linears(&problem, 1, kernel, threads);
    for (std::size_t token = 0; token < one.tokens; ++token) {
        const float* from = x.get() + token * one.in_features;
        double sum = 0;
        float largest = 0;
        for (std::size_t i = 0; i < one.in_features; ++i) {
            sum += std::fabs(from[i]);
            largest = std::max(largest, std::fabs(from[i]));
        }
        const float magnitude = one.int4 ? static_cast<float>(sum / static_cast<double>(one.in_features)) : largest;
        const double numerator = one.int4 ? 2.6457512378692627f : 127.0f;
        const auto token_scale = static_cast<float>(numerator / std::max(magnitude, 1e-5f));
        std::vector<int> q(one.in_features);
        for (std::size_t i = 0; i < one.in_features; ++i)
            q[i] = std::clamp(static_cast<int>(std::nearbyint(from[i] * token_scale)), one.int4 ? -8 : -128,
                              one.int4 ? 7 : 127);
        for (std::size_t row = 0; row < one.rows; ++row) {
            long long product = 0;
            for (std::size_t i = 0; i < one.in_features; ++i) product += q[i] * codes[row * one.in_features + i];
            float expected = static_cast<float>(product) * (row_scale[row] / token_scale);
            if (one.with_bias) expected += bias[row];
            if (y[token * one.rows + row] != expected) {
                std::printf("%s: format %d, %zu x %zu, %zu tokens, %d threads: [%zu, %zu] is %.9g, not %.9g\n",
                            kernel.name, static_cast<int>(one.format), one.rows, one.in_features, one.tokens, threads,
                            token, row, static_cast<double>(y[token * one.rows + row]), static_cast<double>(expected));
                return false;
            }
        }
    }
    return true;
}

// Whether what a task throws comes to the caller, when no task runs any more, and the threads go on afterwards.
bool throws_cleanly() {
    for (int round = 0; round < 200; ++round) {
        std::atomic<int> inside{0};
        const auto fails = static_cast<std::size_t>(round % 7);
        bool caught = false;
        try {
            run_tasks(3, 64, [&](std::size_t index) {
                ++inside;
                if (index == fails) {
                    --inside;
                    throw std::bad_alloc();
                }
                std::this_thread::sleep_for(std::chrono::microseconds(20));
                --inside;
            });
        } catch (const std::bad_alloc&) {
            caught = inside == 0;
        }
        std::atomic<int> done{0};
        run_tasks(3, 64, [&](std::size_t) { ++done; });
        if (!caught || done != 64) return false;
    }
    return true;
}

}  // namespace

int main() {
    if (!throws_cleanly()) return std::printf("an exception of a task is lost, or comes too early\n"), 1;
    const std::size_t shapes[][2] = {{1, 4}, {5, 36}, {13, 252}, {50, 260}, {97, 644}, {26, 1028}};
    const std::size_t token_counts[] = {0, 1, 3, 7, 8, 33};
    int number = 0;
    for (const Kernel* const* kernel = kernels(); *kernel != nullptr; ++kernel) {
        int cases = 0;
        for (int format = 0; format < 5; ++format)
            for (const auto& shape : shapes)
                for (const std::size_t tokens : token_counts) {
                    ++number, ++cases;
                    const auto is_g4 = static_cast<Format>(format) >= Format::g4;
                    const std::size_t in_features = shape[1] + (is_g4 ? 0 : static_cast<std::size_t>(number % 4));
                    const Case one{static_cast<Format>(format), shape[0], in_features, tokens, number % 2 == 0,
                                   number % 3 == 0, number % 5 == 0, number % 7 == 0};
                    if (!is_right(**kernel, one, 1 + number % 3)) return 1;
                }
        std::printf("%s: %d cases equal\n", (*kernel)->name, cases);
    }
    return 0;
}

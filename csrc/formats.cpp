// Formats t5 and g4 to i2 by tables, for instruction sets without a faster way. Little-endian machines only.
#include <array>
#include <cstring>

#include "packed_linear.hpp"

namespace sparse_bitnet {
namespace {

using Book = std::array<std::uint8_t, 64>;

constexpr bool is_allowed(unsigned byte, int fewest, int most) {
    int nonzeros = 0;
    for (int field = 0; field < 4; ++field) {
        const unsigned digit = byte >> (2 * field) & 3;
        if (digit == 3) return false;
        nonzeros += digit != 1;
    }
    return fewest <= nonzeros && nonzeros <= most;
}

constexpr Book make_book(int fewest, int most, int bits) {
    Book book{};
    int number = 0;
    for (unsigned byte = 0; byte < 256; ++byte)
        if (is_allowed(byte, fewest, most)) book[number++] = static_cast<std::uint8_t>(byte);
    for (int copy = 1 << bits; copy < 64; ++copy) book[copy] = book[copy - (1 << bits)];
    return book;
}

constexpr Book kAtMostTwo = make_book(0, 2, 6);
constexpr Book kExactlyTwo = make_book(2, 2, 5);
constexpr Book kExactlyThree = make_book(3, 3, 5);

// Two numbers at once -> two bytes of i2
template <int kBits>
struct Pairs {
    std::uint16_t entries[1 << (2 * kBits)];

    constexpr explicit Pairs(const Book& book) : entries{} {
        for (unsigned pair = 0; pair < 1u << (2 * kBits); ++pair)
            entries[pair] =
                static_cast<std::uint16_t>(book[pair & ((1 << kBits) - 1)] | book[pair >> kBits] << 8);
    }

    void decode(const std::uint8_t* packed, std::size_t bytes, std::size_t groups, std::uint8_t* out) const {
        for (std::size_t group = 0, at = 0; group < groups; group += 8, at += kBits) {
            std::uint64_t eight = 0;  // numbers, kBits bytes
            if (at + 8 <= bytes)
                std::memcpy(&eight, packed + at, 8);
            else
                std::memcpy(&eight, packed + at, bytes - at);
            std::uint64_t decoded = 0;
            for (int pair = 0; pair < 4; ++pair)
                decoded |= std::uint64_t{entries[eight >> (2 * kBits * pair) & ((1 << (2 * kBits)) - 1)]} << (16 * pair);
            std::memcpy(out + group, &decoded, 8);
        }
    }
};

// A byte of t5 -> its five codes as 10 bits
struct Fives {
    std::uint16_t entries[256];

    constexpr Fives() : entries{} {
        for (unsigned byte = 0; byte < 256; ++byte) {
            unsigned rest = byte, fields = 0;
            for (int digit = 0; digit < 5; ++digit, rest /= 3) fields |= rest % 3 << (2 * digit);
            entries[byte] = static_cast<std::uint16_t>(fields);
        }
    }

    void decode(const std::uint8_t* packed, std::size_t bytes, std::size_t i2_bytes, std::uint8_t* out) const {
        for (std::size_t at = 0, to = 0; to < i2_bytes; at += 4, to += 5) {
            std::uint64_t twenty = 0;
            for (std::size_t byte = 0; byte < 4 && at + byte < bytes; ++byte)
                twenty |= std::uint64_t{entries[packed[at + byte]]} << (10 * byte);
            std::memcpy(out + to, &twenty, 8);
        }
    }
};

constexpr Pairs<6> kPairsAtMostTwo(kAtMostTwo);
constexpr Pairs<5> kPairsExactlyTwo(kExactlyTwo);
constexpr Pairs<5> kPairsExactlyThree(kExactlyThree);
constexpr Fives kFives;

}  // namespace

const std::uint8_t* codebook(Format format) {
    switch (format) {
        case Format::g4: return kAtMostTwo.data();
        case Format::g4s2: return kExactlyTwo.data();
        case Format::g4s3: return kExactlyThree.data();
        default: return nullptr;
    }
}

void decode_to_i2(const Weight& weight, const std::uint8_t* row, std::uint8_t* out) {
    const std::size_t bytes = i2_bytes(weight.in_features);
    switch (weight.format) {
        case Format::i2: std::memcpy(out, row, bytes); break;
        case Format::t5: kFives.decode(row, weight.row_bytes, bytes, out); break;
        case Format::g4: kPairsAtMostTwo.decode(row, weight.row_bytes, bytes, out); break;
        case Format::g4s2: kPairsExactlyTwo.decode(row, weight.row_bytes, bytes, out); break;
        case Format::g4s3: kPairsExactlyThree.decode(row, weight.row_bytes, bytes, out); break;
    }
}

}  // namespace sparse_bitnet

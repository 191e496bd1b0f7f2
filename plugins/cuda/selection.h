// Selection of the k largest keys, in functions of a single thread, which the host can test without a GPU.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DYNEXPORT_HOST_DEVICE __host__ __device__
#else
#define DYNEXPORT_HOST_DEVICE
#endif

namespace dynexport
{

constexpr int32_t kDigitBits = 8;
constexpr int32_t kDigits = 1 << kDigitBits;
constexpr int32_t kTopShift = 32 - kDigitBits;

// The selection: every key above `key`, and the first `ties` keys equal to it.
struct Threshold
{
    uint32_t key;
    int32_t ties;
};

// Returns a key that orders like the score; 0 for NaN and minus infinity, which are never chosen; -0 equals 0.
DYNEXPORT_HOST_DEVICE inline uint32_t orderKey(float score)
{
    uint32_t bits;
    if (score == 0.0F)
    {
        score = 0.0F;
    }
    std::memcpy(&bits, &score, sizeof(bits));
    constexpr uint32_t kSign = 0x80000000U;
    constexpr uint32_t kInfinity = 0x7f800000U;
    bool const isNan = (bits & ~kSign) > kInfinity;
    if (isNan || bits == (kSign | kInfinity))
    {
        return 0;
    }
    return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

DYNEXPORT_HOST_DEVICE inline uint32_t digitOf(uint32_t key, int32_t shift)
{
    return (key >> shift) & (kDigits - 1);
}

// Returns whether the digits above `shift` equal those that were found before.
DYNEXPORT_HOST_DEVICE inline bool hasPrefix(uint32_t key, uint32_t prefix, int32_t shift)
{
    uint32_t const mask = ~(~0U >> (kTopShift - shift));
    return (key & mask) == (prefix & mask);
}

// Returns the number of keys of the histogram with a larger digit.
DYNEXPORT_HOST_DEVICE inline int32_t largerThan(uint32_t const* histogram, int32_t digit)
{
    int32_t larger = 0;
    for (int32_t other = kDigits - 1; other > digit; --other)
    {
        larger += static_cast<int32_t>(histogram[other]);
    }
    return larger;
}

// Returns whether the wanted-th largest key has this digit; true for exactly one digit if 1 <= wanted <= all keys.
DYNEXPORT_HOST_DEVICE inline bool isDigit(int32_t larger, uint32_t same, int32_t wanted)
{
    return larger < wanted && wanted <= larger + static_cast<int32_t>(same);
}

// Returns the slot of position i, or a number >= capacity for none: chosen positions in order, then the others.
struct Placement
{
    int32_t slot;
    bool chosen;
};

DYNEXPORT_HOST_DEVICE inline Placement place(
    int32_t i, uint32_t key, Threshold threshold, int32_t chosen, int32_t aboveBefore, int32_t tiesBefore)
{
    bool const isTie = key == threshold.key && tiesBefore < threshold.ties;
    int32_t const chosenTies = tiesBefore < threshold.ties ? tiesBefore : threshold.ties;
    int32_t const chosenBefore = aboveBefore + chosenTies;
    bool const isChosen = key > threshold.key || isTie;
    return {isChosen ? chosenBefore : chosen + i - chosenBefore, isChosen};
}

} // namespace dynexport

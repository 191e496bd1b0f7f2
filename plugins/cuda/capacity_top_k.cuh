// CapacityTopK: one block per row. Four histograms of 8 bits each find the k-th largest key (radix select), one more
// sweep writes positions in order. Five reads of the row, however large k is; no workspace; ties need no sorting.
#pragma once

#include "selection.h"
#include "warp.cuh"

namespace dynexport
{
namespace
{

constexpr int32_t kTopKThreads = 1024;

// Scores often share their first digit, so lanes with the same digit add once together instead of one by one.
__device__ void count(uint32_t* histogram, uint32_t digit, bool counts)
{
    uint32_t const peers = __match_any_sync(kAllLanes, counts ? digit : kDigits);
    int32_t const lane = threadIdx.x % kWarp;
    if (counts && lane == __ffs(peers) - 1)
    {
        atomicAdd(&histogram[digit], __popc(peers));
    }
}

// Returns the wanted-th largest key of the row, and how many keys equal to it are chosen; same in every thread.
__device__ Threshold findThreshold(float const* scores, int32_t length, int32_t wanted)
{
    __shared__ uint32_t histogram[kDigits];
    __shared__ Threshold found;
    int32_t const thread = threadIdx.x;
    if (thread == 0)
    {
        found = {0, wanted};
    }
    for (int32_t shift = kTopShift; shift >= 0; shift -= kDigitBits)
    {
        if (thread < kDigits)
        {
            histogram[thread] = 0;
        }
        __syncthreads();
        Threshold const current = found;
        for (int32_t first = 0; first < length; first += kTopKThreads)
        {
            int32_t const i = first + thread;
            uint32_t const key = i < length ? orderKey(scores[i]) : 0;
            count(histogram, digitOf(key, shift), i < length && hasPrefix(key, current.key, shift));
        }
        __syncthreads();
        if (thread < kDigits)
        {
            int32_t const larger = largerThan(histogram, thread);
            if (isDigit(larger, histogram[thread], current.ties))
            {
                found = {current.key | static_cast<uint32_t>(thread) << shift, current.ties - larger};
            }
        }
        __syncthreads();
    }
    return found;
}

// Exclusive prefix sums of two flags over the block, and their totals, each packed into half a word.
struct Prefix
{
    uint32_t before;
    uint32_t total;
};

__device__ Prefix scan(bool above, bool tie, uint32_t* ofWarps)
{
    int32_t const lane = threadIdx.x % kWarp;
    int32_t const warp = threadIdx.x / kWarp;
    uint32_t const aboveLanes = __ballot_sync(kAllLanes, above);
    uint32_t const tieLanes = __ballot_sync(kAllLanes, tie);
    if (lane == 0)
    {
        ofWarps[warp] = __popc(aboveLanes) << 16 | __popc(tieLanes);
    }
    __syncthreads();
    uint32_t sum = ofWarps[lane];
    for (int32_t step = 1; step < kWarp; step *= 2)
    {
        uint32_t const lower = __shfl_up_sync(kAllLanes, sum, step);
        sum += lane >= step ? lower : 0;
    }
    uint32_t const lowerLanes = (1U << lane) - 1;
    uint32_t const inWarp = __popc(aboveLanes & lowerLanes) << 16 | __popc(tieLanes & lowerLanes);
    uint32_t const ofLowerWarps = __shfl_sync(kAllLanes, sum, (warp + kWarp - 1) % kWarp);
    return {inWarp + (warp == 0 ? 0 : ofLowerWarps), __shfl_sync(kAllLanes, sum, kWarp - 1)};
}

__device__ void writeInOrder(float const* scores, int32_t length, int32_t capacity, Threshold threshold, int32_t chosen,
    int64_t* positions, int32_t* valid)
{
    // Two buffers: the next sweep writes one while slow warps still read the other.
    __shared__ uint32_t ofWarps[2][kTopKThreads / kWarp];
    int32_t above = 0;
    int32_t ties = 0;
    for (int32_t first = 0; first < length; first += kTopKThreads)
    {
        int32_t const i = first + static_cast<int32_t>(threadIdx.x);
        uint32_t const key = i < length ? orderKey(scores[i]) : 0;
        bool const isAbove = i < length && key > threshold.key;
        bool const isTie = i < length && key == threshold.key;
        Prefix const prefix = scan(isAbove, isTie, ofWarps[first / kTopKThreads % 2]);
        int32_t const aboveBefore = above + static_cast<int32_t>(prefix.before >> 16);
        int32_t const tiesBefore = ties + static_cast<int32_t>(prefix.before & 0xffffU);
        Placement const placed = place(i, key, threshold, chosen, aboveBefore, tiesBefore);
        if (i < length && placed.slot < capacity)
        {
            positions[placed.slot] = i;
            valid[placed.slot] = placed.chosen ? 1 : 0;
        }
        above += static_cast<int32_t>(prefix.total >> 16);
        ties += static_cast<int32_t>(prefix.total & 0xffffU);
    }
}

} // namespace

extern "C" __global__ void __launch_bounds__(kTopKThreads) dynexport_capacity_top_k(void const* scores, void const* counts,
    void const*, int32_t length, int32_t capacity, void* positions, void* valid)
{
    int64_t const row = blockIdx.x;
    float const* const ofRow = static_cast<float const*>(scores) + row * length;
    int64_t const asked = static_cast<int64_t const*>(counts)[row];
    int32_t const most = min(length, capacity);
    int32_t const wanted = static_cast<int32_t>(max(int64_t{0}, min(asked, int64_t{most})));
    Threshold threshold{~0U, 0};
    int32_t chosen = wanted;
    if (wanted > 0)
    {
        threshold = findThreshold(ofRow, length, wanted);
    }
    if (threshold.key == 0)
    {
        // Fewer candidates than wanted: keys equal to the threshold are not candidates.
        chosen = wanted - threshold.ties;
        threshold.ties = 0;
    }
    int64_t* const ownPositions = static_cast<int64_t*>(positions) + row * capacity;
    int32_t* const ownValid = static_cast<int32_t*>(valid) + row * capacity;
    writeInOrder(ofRow, length, capacity, threshold, chosen, ownPositions, ownValid);
    for (int32_t slot = length + static_cast<int32_t>(threadIdx.x); slot < capacity; slot += kTopKThreads)
    {
        ownPositions[slot] = 0;
        ownValid[slot] = 0;
    }
}

} // namespace dynexport

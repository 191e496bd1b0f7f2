// Enough of CUDA to run kernels on the host: a block's threads are fibers of one thread, blocks follow one another.
//
// Compiled before the kernels. Warp operations and barriers are exact; that memory is shared without races is not
// tested, for fibers change only where they wait.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(threads)

using std::max;
using std::min;

namespace fake
{

struct Index
{
    uint32_t x;
};

constexpr int32_t kWarp = 32;
constexpr size_t kStack = 64 * 1024;

struct Barrier
{
    int32_t arrived = 0;
    int32_t generation = 0;
};

struct Warp
{
    Barrier barrier;
    uint64_t values[kWarp] = {};
    int32_t size = kWarp;
};

struct Fiber
{
    ucontext_t context{};
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done = false;
};

inline ucontext_t gScheduler;
inline std::vector<std::unique_ptr<Fiber>> gFibers;
inline std::vector<Warp> gWarps;
inline Barrier gBlock;
inline int32_t gThreads = 0;
inline std::function<void()> gBody;
inline Index gThread{};
inline Index gBlockIndex{};

inline void wait(Barrier& barrier, int32_t count)
{
    int32_t const generation = barrier.generation;
    if (++barrier.arrived == count)
    {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation)
    {
        uint32_t const self = gThread.x;
        swapcontext(&gFibers[self]->context, &gScheduler);
    }
}

// What every lane of the warp brings; all lanes have to come.
template <typename Result>
Result exchange(uint64_t value, Result (*read)(uint64_t const*, int32_t lane, int64_t argument), int64_t argument)
{
    int32_t const lane = gThread.x % kWarp;
    Warp& warp = gWarps[gThread.x / kWarp];
    warp.values[lane] = value;
    wait(warp.barrier, warp.size);
    Result const result = read(warp.values, lane, argument);
    wait(warp.barrier, warp.size);
    return result;
}

inline void enter()
{
    gBody();
    gFibers[gThread.x]->done = true;
    swapcontext(&gFibers[gThread.x]->context, &gScheduler);
}

inline void runBlock(int32_t threads)
{
    while (static_cast<int32_t>(gFibers.size()) < threads)
    {
        gFibers.push_back(std::make_unique<Fiber>());
    }
    gThreads = threads;
    gBlock = {};
    gWarps.assign(threads / kWarp, Warp{});
    for (int32_t i = 0; i < threads; ++i)
    {
        Fiber& fiber = *gFibers[i];
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        makecontext(&fiber.context, enter, 0);
    }
    for (bool running = true; running;)
    {
        running = false;
        for (int32_t i = 0; i < threads; ++i)
        {
            if (!gFibers[i]->done)
            {
                gThread.x = i;
                swapcontext(&gScheduler, &gFibers[i]->context);
                running = true;
            }
        }
    }
}

template <typename Body>
void launch(int64_t blocks, int32_t threads, Body body)
{
    gBody = body;
    for (int64_t i = 0; i < blocks; ++i)
    {
        gBlockIndex.x = static_cast<uint32_t>(i);
        runBlock(threads);
    }
}

template <typename T>
uint64_t bitsOf(T value)
{
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(value));
    return bits;
}

template <typename T>
T valueOf(uint64_t bits)
{
    T value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

} // namespace fake

#define threadIdx fake::gThread
#define blockIdx fake::gBlockIndex

inline void __syncthreads()
{
    fake::wait(fake::gBlock, fake::gThreads);
}

inline uint32_t __ballot_sync(uint32_t, bool flag)
{
    return fake::exchange<uint32_t>(
        flag,
        [](uint64_t const* values, int32_t, int64_t)
        {
            uint32_t lanes = 0;
            for (int32_t i = 0; i < fake::kWarp; ++i)
            {
                lanes |= static_cast<uint32_t>(values[i]) << i;
            }
            return lanes;
        },
        0);
}

inline uint32_t __match_any_sync(uint32_t, uint32_t value)
{
    return fake::exchange<uint32_t>(
        value,
        [](uint64_t const* values, int32_t lane, int64_t)
        {
            uint32_t lanes = 0;
            for (int32_t i = 0; i < fake::kWarp; ++i)
            {
                lanes |= static_cast<uint32_t>(values[i] == values[lane]) << i;
            }
            return lanes;
        },
        0);
}

template <typename T>
T shuffle(T value, int64_t lane)
{
    // A lane that does not exist is oneself.
    return fake::exchange<T>(
        fake::bitsOf(value),
        [](uint64_t const* values, int32_t self, int64_t from)
        { return fake::valueOf<T>(values[from < 0 || from >= fake::kWarp ? self : from]); },
        lane);
}

template <typename T>
T __shfl_sync(uint32_t, T value, int32_t lane)
{
    return shuffle(value, lane);
}

template <typename T>
T __shfl_up_sync(uint32_t, T value, int32_t step)
{
    return shuffle(value, static_cast<int64_t>(fake::gThread.x % fake::kWarp) - step);
}

template <typename T>
T __shfl_down_sync(uint32_t, T value, int32_t step)
{
    return shuffle(value, static_cast<int64_t>(fake::gThread.x % fake::kWarp) + step);
}

inline uint32_t atomicAdd(uint32_t* place, uint32_t value)
{
    uint32_t const before = *place;
    *place += value;
    return before;
}

inline int32_t __popc(uint32_t bits)
{
    return __builtin_popcount(bits);
}

inline int32_t __ffs(uint32_t bits)
{
    return __builtin_ffs(static_cast<int>(bits));
}

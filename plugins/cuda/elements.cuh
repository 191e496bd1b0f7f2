// The floating-point types that the kernels are compiled for; all arithmetic is float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace dynexport
{

__device__ inline float toFloat(float value)
{
    return value;
}

__device__ inline float toFloat(__half value)
{
    return __half2float(value);
}

__device__ inline float toFloat(__nv_bfloat16 value)
{
    return __bfloat162float(value);
}

template <typename T>
__device__ T fromFloat(float value);

template <>
__device__ inline float fromFloat<float>(float value)
{
    return value;
}

template <>
__device__ inline __half fromFloat<__half>(float value)
{
    return __float2half_rn(value);
}

template <>
__device__ inline __nv_bfloat16 fromFloat<__nv_bfloat16>(float value)
{
    return __float2bfloat16_rn(value);
}

} // namespace dynexport

// A kernel has one C name for each type, so that it can be looked up in a cubin and embedded in an engine.
#define DYNEXPORT_FOR_EACH_ELEMENT(DEFINE)                                                                             \
    DEFINE(float32, float)                                                                                             \
    DEFINE(float16, __half)                                                                                            \
    DEFINE(bfloat16, __nv_bfloat16)

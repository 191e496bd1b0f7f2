// The kernels on the host, behind the driver's C interface: what plugins/driver.py loads instead of libcuda.so.
//
// Memory of the device is memory of the host. A parameter is read as the kernel's own signature says.
#include "cuda_on_host.h"

#include "../../plugins/cuda/kernels.cu"

#include <cstring>

namespace
{

// Calls a kernel with an array of pointers to its arguments, as the driver does.
template <typename... Parameters, size_t... I>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>)
{
    kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[I])...);
}

template <typename... Parameters>
std::function<void(void**)> bind(void (*kernel)(Parameters...))
{
    return [kernel](void** arguments) { call(kernel, arguments, std::index_sequence_for<Parameters...>{}); };
}

struct Named
{
    char const* name;
    std::function<void(void**)> kernel;
};

Named const kKernels[] = {
    {"dynexport_capacity_top_k", bind(dynexport::dynexport_capacity_top_k)},
#define NAMED(TYPE, T)                                                                                                 \
    {"dynexport_gated_scatter_add_" #TYPE, bind(dynexport::dynexport_gated_scatter_add_##TYPE)},                       \
    {"dynexport_ragged_kv_append_" #TYPE, bind(dynexport::dynexport_ragged_kv_append_##TYPE)},                         \
    {"dynexport_selected_matmul_" #TYPE, bind(dynexport::dynexport_selected_matmul_##TYPE)},
    DYNEXPORT_FOR_EACH_ELEMENT(NAMED)
#undef NAMED
};

} // namespace

extern "C"
{

int cuCtxGetCurrent(void** context)
{
    *context = nullptr;
    return 0;
}

int cuModuleLoadData(void** module, void const*)
{
    *module = nullptr;
    return 0;
}

int cuModuleGetFunction(void** function, void*, char const* name)
{
    for (Named const& named : kKernels)
    {
        if (std::strcmp(named.name, name) == 0)
        {
            *function = const_cast<Named*>(&named);
            return 0;
        }
    }
    return 500; // CUDA_ERROR_NOT_FOUND
}

int cuLaunchKernel(void* function, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned blockX, unsigned blockY,
    unsigned blockZ, unsigned shared, void*, void** arguments, void** extra)
{
    if (gridX == 0 || gridY != 1 || gridZ != 1 || blockY != 1 || blockZ != 1 || shared != 0 || extra != nullptr)
    {
        return 1; // CUDA_ERROR_INVALID_VALUE
    }
    auto const& kernel = static_cast<Named*>(function)->kernel;
    fake::launch(gridX, static_cast<int32_t>(blockX), [&] { kernel(arguments); });
    return 0;
}

int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void*)
{
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void const*>(from), bytes);
    return 0;
}

} // extern "C"

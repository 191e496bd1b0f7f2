// The GPU that engines run on.
#pragma once

#include <string>

namespace dynexport::tensorrt {

// The first CUDA device: the driver's name of the model, compute capability such as "8.9", and the newest CUDA version
// that the driver supports.
struct Gpu {
  std::string name, compute_capability, cuda;
};

// Throws Error, with the reason alone, when there is none.
Gpu find_gpu();

}  // namespace dynexport::tensorrt

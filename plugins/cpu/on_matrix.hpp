// What the operators have in common: the kernels of this processor, and the matrix of the node.
#pragma once

#include "context.hpp"
#include "rows.hpp"

namespace dynexport::cpu {

// A kernel of ONNX Runtime on a matrix that ``Weights`` reads from the node.
template <class Kernel, class Weights>
class OnMatrix : public Computed<Kernel> {
 public:
  explicit OnMatrix(const Ort::ConstKernelInfo& info) : kernels_(needed_kernels()), weights_(info) {}

 protected:
  const Kernels& kernels_;
  Weights weights_;
};

}  // namespace dynexport::cpu

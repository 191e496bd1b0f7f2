// The kernels of attention with AVX2, FMA and F16C.
#include "attention_kernels.hpp"

namespace dynexport::cpu {

extern const AttentionKernels kAttentionAvx2 = kAttention;

}  // namespace dynexport::cpu

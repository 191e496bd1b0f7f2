// The kernels of attention with AVX-512.
#include "attention_kernels.hpp"

namespace dynexport::cpu {

extern const AttentionKernels kAttentionAvx512 = kAttention;

}  // namespace dynexport::cpu

// The kernels of attention with what every processor of its kind has.
#include "attention_kernels.hpp"

namespace dynexport::cpu {

extern const AttentionKernels kAttentionPortable = kAttention;

}  // namespace dynexport::cpu

// What the library offers: its operators, its version, and the kernels that run on this processor.
#include "after_attention.hpp"
#include "attention_operator.hpp"
#include "block_weights.hpp"
#include "gather.hpp"
#include "half_weights.hpp"
#include "layer_choice.hpp"
#include "matmul.hpp"
#include "route_operators.hpp"
#include "selected_operators.hpp"

#define DYNEXPORT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using dynexport::cpu::BlockWeights, dynexport::cpu::HalfWeights;

template <class... Kernel>
OrtStatus* add_operators(OrtSessionOptions* options, const OrtApi& api) {
  // Sessions keep pointers to them, so they are never destroyed.
  static const auto* const domain = [] {
    auto* const made = new Ort::CustomOpDomain("dynexport");
    (made->Add(new dynexport::cpu::Operator<Kernel>()), ...);
    return made;
  }();
  return api.AddCustomOpDomain(options, *domain);
}

}  // namespace

// The name that ONNX Runtime looks for in a library of operators.
DYNEXPORT_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace dynexport::cpu;
  const OrtApi* const api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    // An older release: its oldest interface can still say so.
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, "dynexport's operators need a later ONNX Runtime");
  }
  Ort::InitApi(api);
  try {
    return add_operators<MatMul<BlockWeights, false>, MatMul<BlockWeights, true>, AfterAttention<BlockWeights>,
                         Gather<BlockWeights>, MatMul<HalfWeights, false>, MatMul<HalfWeights, true>,
                         AfterAttention<HalfWeights>, Gather<HalfWeights>, RouteTokens, GatherTokens, ScatterGated,
                         SelectedMatMul<BlockWeights>, SelectedMatMul<HalfWeights>, SelectedFloatMatMul, SelectedNorm,
                         SelectedAddNorm, ChooseLayer, CachedAttention<float>, CachedAttention<Ort::Float16_t>,
                         CachedAttention<std::int8_t>>(options, *api);
  } catch (const Ort::Exception& error) {
    return api->CreateStatus(error.GetOrtErrorCode(), error.what());
  }
}

DYNEXPORT_EXPORT const char* dynexport_cpu_version() { return DYNEXPORT_CPU_VERSION; }

// The instruction set in use; null where the environment names one that this processor lacks.
DYNEXPORT_EXPORT const char* dynexport_cpu_kernels() {
  const auto* const chosen = dynexport::cpu::chosen_kernels();
  return chosen == nullptr ? nullptr : chosen->name;
}

// The external data that an ONNX file refers to.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace dynexport {

struct ExternalData {
  std::string tensor, location;
};

// Returns the external data of every tensor in a serialized ModelProto, at any depth: of initializers, attributes,
// subgraphs, functions and sparse tensors. Throws Error, which names ``where``, for bytes that are no such message.
std::vector<ExternalData> external_data(std::string_view model, const std::string& where);

}  // namespace dynexport

// Walks through the wire format of an ONNX file, as far as the messages that hold tensors.
#include "bundle/onnx_file.hpp"

#include <cstdint>
#include <optional>

#include "dynexport/error.hpp"

namespace dynexport {
namespace {

enum class Message { kModel, kTraining, kFunction, kGraph, kNode, kAttribute, kSparseTensor, kTensor, kEntry };

struct Field {
  Message in;
  std::uint64_t number;
  Message holds;
};

// The fields of onnx.proto through which a tensor is reached.
constexpr Field kFields[] = {
    {Message::kModel, 7, Message::kGraph},              // graph
    {Message::kModel, 20, Message::kTraining},          // training_info
    {Message::kModel, 25, Message::kFunction},          // functions
    {Message::kTraining, 1, Message::kGraph},           // initialization
    {Message::kTraining, 2, Message::kGraph},           // algorithm
    {Message::kFunction, 7, Message::kNode},            // node
    {Message::kFunction, 11, Message::kAttribute},      // attribute_proto
    {Message::kGraph, 1, Message::kNode},               // node
    {Message::kGraph, 5, Message::kTensor},             // initializer
    {Message::kGraph, 15, Message::kSparseTensor},      // sparse_initializer
    {Message::kNode, 5, Message::kAttribute},           // attribute
    {Message::kAttribute, 5, Message::kTensor},         // t
    {Message::kAttribute, 6, Message::kGraph},          // g
    {Message::kAttribute, 10, Message::kTensor},        // tensors
    {Message::kAttribute, 11, Message::kGraph},         // graphs
    {Message::kAttribute, 22, Message::kSparseTensor},  // sparse_tensor
    {Message::kAttribute, 23, Message::kSparseTensor},  // sparse_tensors
    {Message::kSparseTensor, 1, Message::kTensor},      // values
    {Message::kSparseTensor, 2, Message::kTensor},      // indices
    {Message::kTensor, 13, Message::kEntry},            // external_data
};
// TensorProto.name; key and value of StringStringEntryProto.
constexpr std::uint64_t kTensorName = 8, kKey = 1, kValue = 2;
// As in protobuf.
constexpr std::size_t kDeepest = 100;

std::optional<Message> held_by(Message in, std::uint64_t number) {
  for (const Field& field : kFields) {
    if (field.in == in && field.number == number) return field.holds;
  }
  return std::nullopt;
}

// A field of a message; content is of fields with a length only.
struct Read {
  std::uint64_t number = 0;
  bool has_content = false;
  std::string_view content;
};

class Walk {
 public:
  explicit Walk(const std::string& where) : where_(where) {}

  std::vector<ExternalData> found;

  void model(std::string_view bytes) { message(bytes, Message::kModel, 0); }

 private:
  void message(std::string_view bytes, Message kind, std::size_t depth) {
    if (depth > kDeepest) refuse("more than 100 levels of messages");
    if (kind == Message::kTensor) return tensor(bytes);
    while (!bytes.empty()) {
      const Read field = next(bytes);
      const std::optional<Message> held = field.has_content ? held_by(kind, field.number) : std::nullopt;
      if (held) message(field.content, *held, depth + 1);
    }
  }

  void tensor(std::string_view bytes) {
    const std::size_t first = found.size();
    std::string_view name;
    while (!bytes.empty()) {
      const Read field = next(bytes);
      if (!field.has_content) continue;
      if (field.number == kTensorName) name = field.content;
      if (held_by(Message::kTensor, field.number)) entry(field.content);
    }
    for (std::size_t i = first; i < found.size(); ++i) found[i].tensor = name;
  }

  void entry(std::string_view bytes) {
    std::string_view key, value;
    while (!bytes.empty()) {
      const Read field = next(bytes);
      if (field.has_content && field.number == kKey) key = field.content;
      if (field.has_content && field.number == kValue) value = field.content;
    }
    if (key == "location") found.push_back({"", std::string(value)});
  }

  // Takes a field from the start of ``bytes``.
  Read next(std::string_view& bytes) const {
    const std::uint64_t tag = varint(bytes);
    Read field;
    field.number = tag >> 3;
    if (field.number == 0) refuse("a field without a number");
    switch (tag & 7) {
      case 0:
        varint(bytes);
        break;
      case 1:
        take(bytes, 8);
        break;
      case 2:
        field.has_content = true;
        field.content = take(bytes, varint(bytes));
        break;
      case 5:
        take(bytes, 4);
        break;
      default:
        refuse("a field of an unknown kind");
    }
    return field;
  }

  std::string_view take(std::string_view& bytes, std::uint64_t count) const {
    if (count > bytes.size()) refuse("its end in the middle of a field");
    const std::string_view taken = bytes.substr(0, count);
    bytes.remove_prefix(count);
    return taken;
  }

  std::uint64_t varint(std::string_view& bytes) const {
    constexpr unsigned kBits = 64;
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < kBits; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(bytes, 1).front());
      value |= static_cast<std::uint64_t>(byte & 127) << shift;
      if (byte < 128) return value;
    }
    refuse("a number of more than 64 bits");
  }

  [[noreturn]] void refuse(const std::string& what) const {
    throw Error(where_ + ": expected an ONNX model, found something else (" + what + ")");
  }

  const std::string& where_;
};

}  // namespace

std::vector<ExternalData> external_data(std::string_view model, const std::string& where) {
  Walk walk(where);
  walk.model(model);
  return std::move(walk.found);
}

}  // namespace dynexport

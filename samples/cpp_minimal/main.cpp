// Loads a bundle and streams an answer to a prompt, with the sampling that the model's author recommends:
//   cpp_minimal BUNDLE PROMPT [DEPTH]
#include <dynexport/error.hpp>
#include <dynexport/generator.hpp>
#include <exception>
#include <iostream>

namespace {

void answer(const std::string& path, const std::string& prompt, const char* depth) {
  const auto model = dynexport::Generator::load(path);
  const dynexport::Recommended recommended = dynexport::recommended_by(model->bundle());
  dynexport::Options options;
  options.max_new_tokens = 256;
  options.sampling = recommended.sampling;
  options.stop = recommended.stop;
  if (depth != nullptr) options.depth = depth;

  const auto print = [](const dynexport::Piece& piece) {
    std::cout << piece.text << std::flush;
    return std::cout.good();  // false cancels the generation
  };
  model->stream({model->encode(prompt)}, {options}, print);
  std::cout << "\n";
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3 && count != 4) {
    std::cerr << "usage: cpp_minimal BUNDLE PROMPT [DEPTH]\n";
    return dynexport::kExitBadInput;
  }
  try {
    answer(arguments[1], arguments[2], count == 4 ? arguments[3] : nullptr);
    return dynexport::kExitGood;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
  }
  return dynexport::kExitBadInput;
}

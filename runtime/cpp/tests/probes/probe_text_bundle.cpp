// Opens a bundle's tokenizer and chat template, which check themselves: probe_text_bundle BUNDLE.
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>

#include "dynexport/bundle.hpp"
#include "dynexport/chat_template.hpp"
#include "dynexport/error.hpp"
#include "dynexport/tokenizer.hpp"

namespace {

// "good", or the error; and how long it took.
template <typename Open>
nlohmann::json opened(const Open& open) {
  const auto start = std::chrono::steady_clock::now();
  std::string result = "good";
  try {
    if (open() == nullptr) result = "none";
  } catch (const dynexport::Error& error) {
    result = error.what();
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return {{"result", result}, {"seconds", seconds.count()}};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  try {
    const auto bundle = dynexport::Bundle::open(argv[1]);
    const nlohmann::json out = {{"tokenizer", opened([&] { return dynexport::Tokenizer::open(*bundle); })},
                                {"chat", opened([&] { return dynexport::ChatTemplate::open(*bundle); })}};
    std::cout << out.dump() << "\n";
  } catch (const dynexport::Error& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
}

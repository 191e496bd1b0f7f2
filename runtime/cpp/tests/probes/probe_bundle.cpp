// Opens a bundle, or parses manifests, and prints what it read as JSON. The last line of a refusal is "error: ..".
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>

#include "dynexport/bundle.hpp"
#include "dynexport/error.hpp"

int main(int argc, char** argv) {
  if (argc != 2) return 3;
  try {
    const auto bundle = dynexport::Bundle::open(argv[1]);
    std::cout << bundle->manifest().model.layers << "\n";
    return dynexport::kExitGood;
  } catch (const dynexport::Error& error) {
    std::cerr << "error: " << error.what() << "\n";
    return dynexport::kExitBadInput;
  }
}

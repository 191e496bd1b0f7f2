// The command line.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "dynexport/engine.hpp"
#include "dynexport/scheduler.hpp"
#include "settings.hpp"

namespace service {

struct CommandLine {
  std::vector<std::filesystem::path> bundles;
  std::vector<std::string> names;  // one for each bundle
  std::string host = "127.0.0.1";
  int port = 8000;  // 0 takes a free one
  dynexport::Settings scheduler;
  bool speculate = false;
  std::optional<std::int64_t> most_drafts;  // none: what the bundle says
  std::optional<std::string> draft;         // the depth that drafts
  dynexport::BackendOptions backend;
  HttpSettings http;
  bool help = false;
};

// Reads the arguments after the program's name. Throws Error for a wrong one; it names the option.
CommandLine read_options(const std::vector<std::string>& arguments);

// What --help prints.
std::string help_text();

}  // namespace service

#include "options.hpp"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <functional>

#include "dynexport/error.hpp"
#include "keys.hpp"

namespace service {
namespace {

constexpr std::size_t kLongestName = 200, kMostDigits = 12;

std::int64_t whole(const std::string& option, const std::string& text, std::int64_t least, std::int64_t most) {
  std::int64_t value = 0;
  const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (failed != std::errc() || end != text.data() + text.size() || value < least || value > most) {
    throw dynexport::Error(option + ": expected a whole number " + std::to_string(least) + ".." + std::to_string(most) +
                           ", found " + dynexport::shown(text));
  }
  return value;
}

double seconds(const std::string& option, const std::string& text) {
  double value = 0;
  const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (failed != std::errc() || end != text.data() + text.size() || !(value >= 0 && value <= 1e6)) {
    throw dynexport::Error(option + ": expected seconds, 0 to 1000000, found " + dynexport::shown(text));
  }
  return value;
}

// Returns a number of bytes from text such as 512M.
std::int64_t size(const std::string& option, const std::string& text) {
  std::size_t at = 0;
  while (at < text.size() && std::isdigit(static_cast<unsigned char>(text[at])) != 0) ++at;
  std::string unit = text.substr(at);
  for (char& one : unit) one = static_cast<char>(std::toupper(static_cast<unsigned char>(one)));
  const std::string letter = unit.substr(0, unit.find_first_not_of("KMG"));
  const std::string rest = unit.substr(letter.size());
  if (at == 0 || at > kMostDigits || letter.size() > 1 || !(rest.empty() || rest == "B" || rest == "IB")) {
    throw dynexport::Error(option + ": expected a number of bytes such as 512M or 2G, found " + dynexport::shown(text));
  }
  const unsigned shift = letter.empty() ? 0 : letter == "K" ? 10 : letter == "M" ? 20 : 30;
  return std::stoll(text.substr(0, at)) << shift;
}

struct Option {
  const char *name, *value, *help;  // value: "" for a switch
  std::function<void(CommandLine&, const std::string&)> set;
};

constexpr std::int64_t kMost = 1LL << 31;

const std::vector<Option>& options() {
  static const std::vector<Option> all = {
      {"--host", "TEXT", "Address to listen on.  [default: 127.0.0.1]",
       [](CommandLine& to, const std::string& text) { to.host = text; }},
      {"--port", "NUMBER", "Port; 0 takes a free one.  [default: 8000]",
       [](CommandLine& to, const std::string& text) { to.port = static_cast<int>(whole("--port", text, 0, 65535)); }},
      {"--name", "TEXT", "A bundle's name in the API, in their order.  [default: directory]",
       [](CommandLine& to, const std::string& text) { to.names.push_back(text); }},
      {"--max-rows", "NUMBER", "Answers that run at a time.  [default: 8]",
       [](CommandLine& to, const std::string& text) { to.scheduler.rows = whole("--max-rows", text, 0, kMost); }},
      {"--max-length", "NUMBER", "Most tokens of a prompt and its answer.  [default: the model's context]",
       [](CommandLine& to, const std::string& text) { to.scheduler.tokens = whole("--max-length", text, 0, kMost); }},
      {"--chunk", "NUMBER", "Tokens of a prompt's first chunk.  [default: 48]",
       [](CommandLine& to, const std::string& text) { to.scheduler.chunk = whole("--chunk", text, 0, kMost); }},
      {"--queue", "NUMBER", "Requests that may wait.  [default: 256]",
       [](CommandLine& to, const std::string& text) { to.scheduler.queue = whole("--queue", text, 0, kMost); }},
      {"--reserve", "NUMBER", "Tokens of all running requests together.  [default: rows times length]",
       [](CommandLine& to, const std::string& text) { to.scheduler.reserved = whole("--reserve", text, 0, kMost); }},
      {"--prefix-cache", "BYTES", "Memory for known prefixes; 0 for none.  [default: 256M]",
       [](CommandLine& to, const std::string& text) { to.scheduler.prefix_bytes = size("--prefix-cache", text); }},
      {"--speculate", "[NUMBER]",
       "Draft up to as many tokens a step and verify them in one call; the text stays the same.  [without a number: "
       "what calibrate --speculate found, else 8]",
       [](CommandLine& to, const std::string& text) {
         to.speculate = true;
         if (!text.empty()) to.most_drafts = whole("--speculate", text, 1, dynexport::kMostDrafts);
       }},
      {"--draft", "DEPTH", "With --speculate: the depth that drafts.  [default: what followed the last tokens before]",
       [](CommandLine& to, const std::string& text) { to.draft = text; }},
      {"--timeout", "SECONDS", "What a request may take.  [default: 600]",
       [](CommandLine& to, const std::string& text) { to.http.request_seconds = seconds("--timeout", text); }},
      {"--max-body", "BYTES", "Largest body of a request.  [default: 4M]",
       [](CommandLine& to, const std::string& text) {
         to.http.most_bytes = static_cast<std::size_t>(std::min<std::int64_t>(size("--max-body", text), kMost));
       }},
      {"--max-requests", "NUMBER", "Requests at a time, those that wait included.  [default: 1024]",
       [](CommandLine& to, const std::string& text) {
         to.http.requests = static_cast<std::size_t>(whole("--max-requests", text, 1, 1 << 16));
       }},
      {"--header-seconds", "SECONDS", "For a client to send a request's headers.  [default: 10]",
       [](CommandLine& to, const std::string& text) { to.http.header_seconds = seconds("--header-seconds", text); }},
      {"--read-seconds", "SECONDS", "For a client to send a request's body.  [default: 30]",
       [](CommandLine& to, const std::string& text) { to.http.read_seconds = seconds("--read-seconds", text); }},
      {"--stall-seconds", "SECONDS", "For which a client may leave its answer unread.  [default: 30]",
       [](CommandLine& to, const std::string& text) { to.http.stall_seconds = seconds("--stall-seconds", text); }},
      {"--drain-seconds", "SECONDS", "What running requests get to finish after SIGTERM.  [default: 30]",
       [](CommandLine& to, const std::string& text) { to.http.drain_seconds = seconds("--drain-seconds", text); }},
      {"--api-key-file", "PATH", "A file with API keys, one per line.  [default: no keys]",
       [](CommandLine& to, const std::string& text) { to.http.keys = read_keys(text); }},
      {"--backend", "KIND",
       "What runs the graphs: onnxruntime, onnxruntime-cuda, tensorrt or tensorrt-rtx.  [default: onnxruntime]",
       [](CommandLine& to, const std::string& text) { to.backend.kind = text; }},
      {"--weights", "KIND",
       "packed: rearranged at load for the fastest steps; mapped: used as they lie in the file, shared by processes, "
       "fp32 on the CPU.  [default: packed]",
       [](CommandLine& to, const std::string& text) { to.backend.weights = text; }},
      {"--onnxruntime", "PATH", "ONNX Runtime's library, or that of another backend.  [default: by its usual name]",
       [](CommandLine& to, const std::string& text) { to.backend.library = text; }},
      {"--plugins", "PATH", "Library of dynexport's TensorRT plugins, or of its CPU operators.",
       [](CommandLine& to, const std::string& text) { to.backend.plugins = text; }},
      {"--trust-engines", "", "Load TensorRT engines that were built elsewhere. An engine is native code.",
       [](CommandLine& to, const std::string&) { to.backend.trust_engines = true; }},
      {"--threads", "NUMBER", "Threads of ONNX Runtime.  [default: all cores]",
       [](CommandLine& to, const std::string& text) {
         to.backend.threads = static_cast<int>(whole("--threads", text, 0, 1024));
       }},
      {"--help", "", "Show this message and exit.", [](CommandLine& to, const std::string&) { to.help = true; }},
  };
  return all;
}

const Option& option_named(const std::string& name) {
  for (const Option& option : options()) {
    if (name == option.name) return option;
  }
  throw dynexport::Error(dynexport::shown(name) + ": expected an option of --help");
}

// The value of an option, which is the next argument; one in brackets may be left out.
std::string value_of(const Option& option, const std::vector<std::string>& arguments, std::size_t& at) {
  if (*option.value == '\0') return "";
  const bool last = at + 1 == arguments.size();
  if (*option.value == '[') {
    const auto digit = [](unsigned char one) { return std::isdigit(one) != 0; };
    const bool given = !last && std::all_of(arguments[at + 1].begin(), arguments[at + 1].end(), digit);
    return given ? arguments[++at] : "";
  }
  if (last) throw dynexport::Error(std::string(option.name) + ": expected a value, found none");
  return arguments[++at];
}

// Gives every bundle a name: one of --name, else its directory's.
void name_bundles(CommandLine& line) {
  const std::size_t bundles = line.bundles.size();
  if (line.names.size() > bundles) {
    throw dynexport::Error("--name: expected at most " + std::to_string(bundles) + ", one for each bundle, found " +
                           std::to_string(line.names.size()));
  }
  for (std::size_t at = line.names.size(); at < bundles; ++at) {
    std::error_code failed;
    const auto path = std::filesystem::weakly_canonical(line.bundles[at], failed);
    line.names.push_back((path.has_filename() ? path : path.parent_path()).filename().string());
  }
  for (const std::string& name : line.names) {
    const bool plain = std::all_of(name.begin(), name.end(), [](unsigned char c) {
      return std::isalnum(c) != 0 || std::string_view("_.:/+-").find(static_cast<char>(c)) != std::string_view::npos;
    });
    if (!plain || name.empty() || name.size() > kLongestName) {
      throw dynexport::Error("--name: expected letters, digits and . : / + - _, found " + dynexport::shown(name));
    }
    if (std::count(line.names.begin(), line.names.end(), name) > 1) {
      throw dynexport::Error("--name: expected a different one for each bundle, found " + name + " twice");
    }
  }
}

}  // namespace

CommandLine read_options(const std::vector<std::string>& arguments) {
  CommandLine line;
  line.scheduler.prefix_bytes = dynexport::kPrefixBytes;
  for (std::size_t at = 0; at < arguments.size(); ++at) {
    const std::string& argument = arguments[at];
    if (argument.rfind('-', 0) != 0) {
      line.bundles.emplace_back(argument);
      continue;
    }
    const std::size_t equals = argument.find('=');
    const Option& option = option_named(argument == "-h" ? "--help" : argument.substr(0, equals));
    option.set(line, equals != std::string::npos ? argument.substr(equals + 1) : value_of(option, arguments, at));
  }
  if (line.help) return line;
  if (line.draft && !line.speculate) throw dynexport::Error("--draft: expected with --speculate, found without");
  if (line.bundles.empty()) throw dynexport::Error("BUNDLES: expected at least one, found none; see --help");
  name_bundles(line);
  line.scheduler.check();
  return line;
}

std::string help_text() {
  std::string text =
      "Usage: dynexport-serve [OPTIONS] BUNDLES...\n\n"
      "  Serve BUNDLES over HTTP with OpenAI's API, many requests at a time.\n\n"
      "  A request chooses its depth by the field \"depth\" or by a model name such as\n"
      "  smollm2@2. There is no TLS: put a proxy in front. Prompts and keys are never\n"
      "  logged.\n\nOptions:\n";
  for (const Option& option : options()) {
    std::string head = std::string("  ") + option.name + (*option.value != '\0' ? " " : "") + option.value;
    head.resize(std::max<std::size_t>(head.size() + 1, 27), ' ');
    text += head + option.help + "\n";
  }
  return text +
         "\nExamples:\n"
         "  dynexport-serve smollm2 --onnxruntime libonnxruntime.so.1\n"
         "  dynexport-serve smollm2 mod --port 8080 --threads 4 --max-rows 16\n"
         "  dynexport-serve smollm2 --prefix-cache 512M --api-key-file keys.txt\n";
}

}  // namespace service

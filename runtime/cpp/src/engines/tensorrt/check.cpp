#include "engines/tensorrt/check.hpp"

#include <algorithm>
#include <cstdlib>

#include "dynexport/error.hpp"

namespace dynexport::tensorrt {

namespace {

using Reason = std::optional<std::string>;

constexpr int kLeastPortable = 8;

std::string start(const std::string& sha256) { return sha256.substr(0, 12) + ".."; }

std::string plugins_text(const Reason& sha256) { return sha256 ? "plugins " + start(*sha256) : "no plugins"; }

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// Python's packages may have a release of their own at the end, such as ".post1".
bool same_version(const std::string& built, const std::string& here) {
  return built == here || built.compare(0, here.size() + 5, here + ".post") == 0;
}

Reason gpu_difference(const EngineRecord& record, const Gpu& gpu) {
  const std::vector<std::string>& wanted = record.compute_capabilities;
  const bool fits = wanted.empty() ? std::strtol(gpu.compute_capability.c_str(), nullptr, 10) >= kLeastPortable
                                   : std::find(wanted.begin(), wanted.end(), gpu.compute_capability) != wanted.end();
  if (!fits) {
    return "built for compute capability " + (wanted.empty() ? "8.0 and newer" : joined(wanted)) + ", here is " +
           gpu.compute_capability + " (" + gpu.name + ")";
  }
  if (record.gpu && *record.gpu != gpu.name) return "built for " + *record.gpu + ", here is " + gpu.name;
  return std::nullopt;
}

// The first reason that an engine cannot run here, with both values.
Reason difference(const EngineRecord& record, const Here& here) {
  if (record.backend != here.backend) return "built by " + record.backend + ", to be run by " + here.backend;
  if (!same_version(record.backend_version, here.version)) {
    return "built by " + record.backend + " " + record.backend_version + ", here is " + here.version;
  }
  if (record.plugins_sha256 && record.plugins_sha256 != here.plugins_sha256) {
    return "built with " + plugins_text(record.plugins_sha256) + ", here are " + plugins_text(here.plugins_sha256);
  }
  if (Reason reason = gpu_difference(record, here.gpu)) return reason;
  // TensorRT's ONNX parser puts weights into an engine, and it is not part of the library that this program opens.
  if (record.stripped) return "built without its weights, which only the Python runtime can give it";
  return std::nullopt;
}

// The first reason that an engine does not fit the bundle's files or cannot run here.
Reason mismatch(const Bundle& bundle, const Graph& graph, const EngineRecord& record, const Here& here) {
  const GraphHashes now = GraphHashes::of(bundle.manifest(), graph);
  const auto differs = [](const std::string& what, const std::string& then, const std::string& current) {
    return "built from " + what + " " + start(then) + ", the bundle has " + start(current);
  };
  if (record.graph.graph != now.graph) return differs(graph.file, record.graph.graph, now.graph);
  if (record.graph.weights != now.weights) return differs("weights", record.graph.weights, now.weights);
  if (record.graph.interface != now.interface) {
    return differs("shapes or profiles", record.graph.interface, now.interface);
  }
  return difference(record, here);
}

}  // namespace

void check_target(const Bundle& bundle) {
  const std::string& target = bundle.manifest().target;
  if (target == "tensorrt") return;
  throw Error(bundle.path().native() + ": expected a bundle for tensorrt, found one for " + target +
              "; make one with: dynexport convert --target tensorrt");
}

const Stored& engine_for(const Bundle& bundle, const Graph& graph, const std::vector<Stored>& engines,
                         const Here& here) {
  std::size_t refused = 0;
  std::string first;
  for (const bool stripped : {false, true}) {
    for (const Stored& stored : engines) {
      if (stored.record.graph.name != graph.name || stored.record.stripped != stripped) continue;
      const Reason reason = mismatch(bundle, graph, stored.record, here);
      if (!reason) return stored;
      if (refused++ == 0) first = *reason;
    }
  }
  const std::string why = refused == 0 ? "none" : std::to_string(refused) + " that cannot run here (" + first + ")";
  throw Error(bundle.path().native() + ": graph " + graph.name + ": expected an engine, found " + why +
              "; build one with: dynexport build " + bundle.path().native());
}

}  // namespace dynexport::tensorrt

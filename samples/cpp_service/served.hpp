// The models of a server, found by name, with an optional depth behind it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dynexport/worker.hpp"
#include "json.hpp"

namespace service {

// A served model: its name, the thread that runs its requests, and its author's sampling options.
class Served {
 public:
  // Throws Error for a bundle with unusable sampling options.
  Served(std::string name, std::unique_ptr<dynexport::Worker> worker);

  const std::string& name() const { return name_; }
  dynexport::Worker& worker() const { return *worker_; }
  dynexport::Generator& model() const { return worker_->model(); }
  const dynexport::Recommended& recommended() const { return recommended_; }
  // Most tokens of a prompt and its answer.
  std::int64_t tokens() const { return worker_->scheduler().tokens(); }

  // Its entries in the list of models: one for its name, and one with each depth behind it.
  std::vector<Json> described() const;
  // A depth that a request asks for. Throws Error for one that the bundle does not declare; the bundle's path is not
  // in the message.
  dynexport::Depth depth(const std::optional<std::string>& wanted) const;

 private:
  std::vector<dynexport::Depth> depths() const;

  std::string name_;
  std::unique_ptr<dynexport::Worker> worker_;
  dynexport::Recommended recommended_;
  std::int64_t created_;  // seconds since 1970
};

// All models of a server.
class Directory {
 public:
  using Found = std::pair<const Served*, dynexport::Depth>;

  void add(std::unique_ptr<Served> served) { models_.push_back(std::move(served)); }
  const std::vector<std::unique_ptr<Served>>& models() const { return models_; }

  // Returns a model, by its name or name@depth, and the depth to run it at. ``depth`` is the request's own. Throws
  // ApiError for an unknown model or one with an unknown depth, or two depths that differ; Error for an unknown depth
  // of the request's own.
  Found find(const std::string& name, const std::optional<std::string>& depth = std::nullopt) const;

 private:
  const Served* named(const std::string& name) const;

  std::vector<std::unique_ptr<Served>> models_;
};

}  // namespace service

// The paths of the service, and what guards them.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "answering.hpp"
#include "served.hpp"
#include "server.hpp"
#include "settings.hpp"

namespace service {

// Answers requests. Threads share it.
class App {
 public:
  using Expose = std::function<std::string()>;
  using Report = std::function<void(const std::string&)>;

  // ``directory`` and ``settings`` must live longer; ``expose`` returns the metrics; ``report`` receives one line about
  // each fault of the server.
  App(const Directory& directory, const HttpSettings& settings, Expose expose, Report report)
      : directory_(directory), settings_(settings), expose_(std::move(expose)), report_(std::move(report)) {}

  // Answers a request, errors included.
  Guard handle(Exchange& exchange);

 private:
  Guard enter(const std::string& path);
  void route(Exchange& exchange);

  void models(Exchange& exchange) const;
  void model(Exchange& exchange, const std::string& name) const;
  void completions(Exchange& exchange) const;
  void chat_completions(Exchange& exchange) const;
  void tokenize(Exchange& exchange) const;
  void detokenize(Exchange& exchange) const;
  void health(Exchange& exchange) const;
  void ready(Exchange& exchange) const;
  void metrics(Exchange& exchange) const;

  Json body(Exchange& exchange) const;

  const Directory& directory_;
  const HttpSettings& settings_;
  Expose expose_;
  Report report_;
  std::atomic<std::size_t> requests_{0};
};

}  // namespace service

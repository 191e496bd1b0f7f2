// dynexport-serve: serves bundles over HTTP, with OpenAI's API.
#include <sys/resource.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "dynexport/error.hpp"
#include "metrics.hpp"
#include "options.hpp"
#include "routes.hpp"
#include "served.hpp"
#include "server.hpp"

namespace service {
namespace {

// Seconds for clients to read the end of their answers after the workers have stopped.
constexpr double kLastWords = 5;
constexpr long kTick = 50'000'000;  // nanoseconds between two looks at the workers

void warn(const std::string& line) { std::fprintf(stderr, "warning: %s\n", dynexport::one_line(line).c_str()); }

sigset_t told_to_stop() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

// Waits a moment for a signal. Returns it, or none of them as a number below 1.
int next_signal() {
  const sigset_t signals = told_to_stop();
  const timespec tick{0, kTick};
  return ::sigtimedwait(&signals, nullptr, &tick);
}

// Every connection is a file: raises the limit of open files as far as this process may.
void allow_connections() {
  rlimit files{};
  if (::getrlimit(RLIMIT_NOFILE, &files) != 0) return;
  files.rlim_cur = files.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &files);
}

std::string address_of(const CommandLine& line, int port) {
  const bool is_ipv6 = line.host.find(':') != std::string::npos;
  return "http://" + (is_ipv6 ? "[" + line.host + "]" : line.host) + ":" + std::to_string(port);
}

// How tokens of a bundle are drafted; none without --speculate.
std::optional<dynexport::Speculation> asked_speculation(const CommandLine& line, const dynexport::Bundle& bundle) {
  if (!line.speculate) return std::nullopt;
  if (!line.most_drafts && !line.draft) return dynexport::Speculation::of(bundle.manifest());
  dynexport::Speculation asked;
  if (line.most_drafts) asked.most = *line.most_drafts;
  const std::int64_t layers = bundle.manifest().model.layers, context = bundle.manifest().model.max_length;
  if (asked.most >= context) {
    throw dynexport::Error("--speculate: expected a number of drafts, 1.." + std::to_string(context - 1) + ", found " +
                           std::to_string(asked.most));
  }
  if (!line.draft) return asked;
  asked.depth = bundle.depth(*line.draft);
  if (static_cast<std::int64_t>(asked.depth->keep.size()) < layers) return asked;
  throw dynexport::Error("--draft: expected a depth of fewer layers than full (" + std::to_string(layers) +
                         "), which verifies, found " + asked.depth->name + " (" +
                         std::to_string(asked.depth->keep.size()) + ")");
}

void load(const CommandLine& line, Metrics& metrics, Directory& directory) {
  for (std::size_t at = 0; at < line.bundles.size(); ++at) {
    auto model = dynexport::Generator::load(line.bundles[at], line.backend);
    ModelWatch* watch = metrics.watch(line.names[at], model->manifest());
    dynexport::Settings settings = line.scheduler;
    settings.speculation = asked_speculation(line, model->bundle());
    auto worker = std::make_unique<dynexport::Worker>(std::move(model), settings, watch, warn);
    metrics.attach(watch, worker.get());
    directory.add(std::make_unique<Served>(line.names[at], std::move(worker)));
  }
}

bool all_dead(const Directory& directory) {
  for (const auto& served : directory.models()) {
    if (!served->worker().dead()) return false;
  }
  return true;
}

// Lets the requests finish that were taken; a second Ctrl-C ends at once.
void drain(const Directory& directory, Server& server, double seconds) {
  std::atomic<bool> drained{false};
  std::thread draining([&] {
    std::vector<std::thread> closing;
    for (const auto& served : directory.models()) closing.emplace_back([&] { served->worker().close(seconds); });
    for (std::thread& one : closing) one.join();
    server.end_connections(kLastWords);
    drained = true;
  });
  while (!drained) {
    if (next_signal() == SIGINT) std::_Exit(dynexport::kExitGood);
  }
  draining.join();
}

int serve(const CommandLine& line) {
  const bool local = line.host == "127.0.0.1" || line.host == "localhost" || line.host == "::1";
  if (!local && line.http.keys.empty()) {
    warn("--host " + line.host + ": every machine that reaches it can use the models; set --api-key-file");
  }
  int port = line.port;
  const int bound = Server::bind(line.host, port);
  Metrics metrics;
  Directory directory;
  load(line, metrics, directory);
  App app(
      directory, line.http, [&metrics] { return metrics.expose(); }, warn);
  Server server(line.http, [&app](Exchange& exchange) { return app.handle(exchange); });
  for (const auto& served : directory.models()) served->worker().start();
  std::thread listening([&server, bound] { server.run(bound); });
  std::string names;
  for (const std::string& name : line.names) names += (names.empty() ? "" : ", ") + name;
  std::printf("serving %s at %s\n", names.c_str(), address_of(line, port).c_str());
  std::fflush(stdout);
  while (next_signal() < 1 && !all_dead(directory)) {
  }
  server.stop_listening();
  listening.join();
  drain(directory, server, line.http.drain_seconds);
  if (!all_dead(directory)) return dynexport::kExitGood;
  std::fprintf(stderr, "error: the workers of all models have ended by an error; start the server again\n");
  return dynexport::kExitCheckFailed;
}

}  // namespace
}  // namespace service

int main(int count, char** arguments) {
  try {
    // Every thread leaves these signals to the main thread, which waits for them.
    const sigset_t signals = service::told_to_stop();
    ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    std::signal(SIGPIPE, SIG_IGN);
    service::allow_connections();
    const service::CommandLine line = service::read_options({arguments + 1, arguments + count});
    if (line.help) {
      std::fputs(service::help_text().c_str(), stdout);
      return dynexport::kExitGood;
    }
    return service::serve(line);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", dynexport::one_line(error.what()).c_str());
    return dynexport::kExitBadInput;
  }
}

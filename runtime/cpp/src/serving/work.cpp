// Requests of a scheduler.
#include "dynexport/work.hpp"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "bundle/text.hpp"
#include "execution/checks.hpp"
#include "serving/seconds.hpp"

namespace dynexport {
namespace {

Depth wanted_depth(const Generator& model, const std::optional<std::string>& wanted) {
  try {
    return model.bundle().depth(wanted);
  } catch (const Error&) {
    std::string names = model.manifest().full().name;
    for (const Depth& depth : model.manifest().depths) names += ", " + depth.name;
    throw Error("depth: expected one of " + names + ", found " + std::string(cut(wanted.value_or(""), 80)));
  }
}

}  // namespace

std::string_view name_of(Reason reason) {
  switch (reason) {
    case Reason::kCancelled:
      return "cancelled";
    case Reason::kTimeout:
      return "timeout";
    case Reason::kFailed:
      return "failed";
    case Reason::kClosed:
      return "closed";
  }
  return "failed";
}

std::int64_t Work::reserved() const {
  // A request that exceeds every bound must not overflow.
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max() / (2 * kMostChoices);
  const std::int64_t total = std::min(kMost, static_cast<std::int64_t>(prompt.size())) + std::min(kMost, new_tokens);
  return static_cast<std::int64_t>(requests.size()) * total;
}

std::shared_ptr<Work> make_work(const Generator& model, std::vector<std::int64_t> prompt, const Options& options,
                                std::int64_t n, std::optional<double> seconds, Deliver deliver) {
  model.check_prompt(prompt);
  checked_count("n", n, 1, kMostChoices);
  const Depth depth = wanted_depth(model, options.depth);
  auto work = std::make_shared<Work>();
  for (std::int64_t index = 0; index < n; ++index) {
    work->requests.push_back(model.request(prompt, options, depth, index));
  }
  work->prompt = std::move(prompt);
  work->new_tokens = options.max_new_tokens;
  work->deliver = std::move(deliver);
  if (seconds) work->deadline = Clock::now() + duration_of(*seconds);
  return work;
}

}  // namespace dynexport

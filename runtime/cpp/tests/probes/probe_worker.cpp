// Submits requests to a worker from many threads, cancels some, and closes it while others submit: JSON on standard
// input, counts as JSON. {"bundle", "prompts", "failing": prompt or none, "threads", "rounds"}.
#include <atomic>
#include <exception>
#include <iostream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "dynexport/worker.hpp"

namespace {

using dynexport::Answers;
using dynexport::Generator;
using dynexport::Worker;
using nlohmann::json;

constexpr std::int64_t kNewTokens = 6;

struct Counts {
  std::atomic<int> complete{0}, failed{0}, cancelled{0}, full{0}, closed{0}, wrong{0};
};

dynexport::Options options() {
  dynexport::Options options;
  options.max_new_tokens = kNewTokens;
  return options;
}

struct Case {
  Generator::Prompt prompt;
  std::vector<std::int64_t> expected;
};

// Asks for one answer; now and then it leaves early or has no time.
void ask(Worker& worker, const Case& given, std::mt19937& random, Counts& counts) try {
  const auto kind = random() % 8;
  std::optional<double> seconds;
  if (kind == 1) seconds = 0.001;
  const auto work = make_work(worker.model(), given.prompt, options(), 1, seconds);
  Answers answers(worker, {work});
  std::vector<std::int64_t> tokens;
  while (const auto delivery = answers.next()) {
    for (const dynexport::Piece& piece : delivery->pieces) tokens.push_back(piece.token);
    if (delivery->failure) {
      ++counts.failed;
      return;
    }
    if (kind == 0) {
      ++counts.cancelled;
      return;
    }
  }
  ++(tokens == given.expected ? counts.complete : counts.wrong);
} catch (const dynexport::QueueFull&) {
  ++counts.full;
} catch (const dynexport::Closed&) {
  ++counts.closed;
}

// The state of a worker that was closed.
json rest_of(const Worker& worker) {
  return {{"problem", worker.problem()},
          {"dead", worker.dead()},
          {"waiting", worker.waiting()},
          {"running", worker.scheduler().running()},
          {"used", worker.scheduler().used()}};
}

// Many threads ask; two close the worker before all are done.
json crowd(const std::shared_ptr<Generator>& model, const std::vector<Case>& cases, int threads, int rounds) {
  dynexport::Settings settings;
  settings.rows = 3;
  settings.chunk = 4;
  settings.queue = threads - 2;
  settings.prefix_bytes = 1 << 16;
  Worker worker(model, settings);
  const std::string before = worker.problem();
  worker.start();
  Counts counts;
  std::atomic<int> done{0};
  std::vector<std::thread> crowd;
  crowd.reserve(static_cast<std::size_t>(threads));
  for (int number = 0; number < threads; ++number) {
    crowd.emplace_back([&, number] {
      std::mt19937 random(static_cast<unsigned>(number));
      for (int round = 0; round < rounds; ++round) {
        ask(worker, cases[random() % cases.size()], random, counts);
        ++done;
      }
    });
  }
  while (done < threads * rounds * 3 / 4) {
    if (worker.waiting() > settings.queue || worker.scheduler().used() > 1) ++counts.wrong;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  std::thread other([&] { worker.close(0.05); });
  worker.close(0.05);
  other.join();
  for (std::thread& thread : crowd) thread.join();
  json found = rest_of(worker);
  found["before"] = before;
  found["counts"] = {{"complete", counts.complete.load()},   {"failed", counts.failed.load()},
                     {"cancelled", counts.cancelled.load()}, {"full", counts.full.load()},
                     {"closed", counts.closed.load()},       {"wrong", counts.wrong.load()}};
  return found;
}

// A worker that is told to stop lets its requests finish.
json drain(const std::shared_ptr<Generator>& model, const std::vector<Case>& cases) {
  Worker worker(model, {});
  std::vector<std::shared_ptr<dynexport::Work>> works;
  works.reserve(cases.size());
  for (const Case& one : cases) works.push_back(make_work(*model, one.prompt, options()));
  Answers answers(worker, works);
  worker.start();
  worker.close(60);
  int done = 0, failed = 0;
  while (const auto delivery = answers.next()) {
    done += delivery->done ? 1 : 0;
    failed += delivery->failure ? 1 : 0;
  }
  json found = rest_of(worker);
  found["done"] = done;
  found["failed"] = failed;
  return found;
}

// A worker whose thread ends by an error ends all requests.
json broken(const std::shared_ptr<Generator>& model, const std::vector<Case>& cases) {
  std::vector<std::string> lines;
  Worker worker(model, {}, nullptr, [&lines](const std::string& line) { lines.push_back(line); });
  worker.start();
  Answers answers(worker, {make_work(*model, cases.front().prompt, options())});
  const auto thrower = make_work(*model, cases.front().prompt, options());
  thrower->deliver = [](const dynexport::Delivery& delivery) {
    if (!delivery.failure) throw std::runtime_error("no more");
  };
  worker.submit(thrower);
  json failures = json::array();
  while (const auto delivery = answers.next()) {
    if (delivery->failure) failures.push_back(name_of(delivery->failure->reason));
  }
  while (!worker.dead()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  std::string refusal;
  try {
    worker.submit(make_work(*model, cases.front().prompt, options()));
  } catch (const dynexport::Closed& error) {
    refusal = error.what();
  }
  worker.close();
  json found = rest_of(worker);
  found["lines"] = lines;
  found["failures"] = failures;
  found["refusal"] = refusal;
  return found;
}

// An engine that keeps failing makes a worker unready, and one good answer ready again.
json failing(const std::shared_ptr<Generator>& model, const Generator::Prompt& bad, const Generator::Prompt& good) {
  Worker worker(model, {});
  worker.start();
  json problems = json::array();
  for (const auto& prompt : {bad, bad, bad, good}) {
    Answers answers(worker, {make_work(*model, prompt, options())});
    while (answers.next()) {
    }
    problems.push_back(worker.problem());
  }
  return problems;
}

}  // namespace

int main() try {
  const json given = json::parse(std::cin);
  dynexport::BackendOptions backend;
  backend.threads = 1;
  const auto model = Generator::load(given["bundle"].get<std::string>(), backend);
  json found;
  if (given.contains("failing")) {
    found["problems"] = failing(model, given["failing"], given["prompts"][0]);
  } else {
    std::vector<Case> cases;
    for (const Generator::Prompt prompt : given["prompts"]) {
      dynexport::Options alone = options();
      alone.chunk = {4, true};
      cases.push_back({prompt, model->generate(prompt, alone).ids});
    }
    found["crowd"] = crowd(model, cases, given["threads"], given["rounds"]);
    found["drain"] = drain(model, cases);
    found["broken"] = broken(model, cases);
  }
  std::cout << found;
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}

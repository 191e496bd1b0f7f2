// Whose prompt goes on, and who gets a token.
#include <algorithm>
#include <utility>

#include "generation/layers.hpp"
#include "serving/scheduler_state.hpp"
#include "serving/seconds.hpp"

namespace dynexport {
namespace {

// The ids of an answer's tokens from ``first`` to ``last``, prompt and answer as one sequence.
std::vector<std::int64_t> token_ids(const Answer& answer, std::int64_t first, std::int64_t last) {
  const auto prompt = static_cast<std::int64_t>(answer.work->prompt.size());
  std::vector<std::int64_t> ids;
  for (std::int64_t place = first; place < last; ++place) {
    ids.push_back(place < prompt ? answer.work->prompt[static_cast<std::size_t>(place)]
                                 : answer.tokens[static_cast<std::size_t>(place - prompt)]);
  }
  return ids;
}

}  // namespace

// Runs a chunk of one prompt; of the first answer of a request only, where the others may copy its row.
void Scheduler::State::run_prompt() {
  const AnswerPtr answer = next_prompt();
  if (answer == nullptr) return;
  auto stop = static_cast<std::int64_t>(answer->work->prompt.size());
  const std::int64_t end = stop;
  if (!executor.limits().whole_prompts) stop = std::min(stop, answer->done + chunks.size(answer->done));
  std::vector<float> logits;
  try {
    logits = timed_prompt(*answer, stop, stop == end);
  } catch (const Error& error) {
    fail(*answer, error);
    return;
  }
  answer->done = stop;
  save(*answer);
  if (stop < end) return;
  const AnswerGroup answers = shared ? with_copies(answer) : AnswerGroup{answer};
  for (const AnswerPtr& other : answers) {
    other->ready = true;
    if (!speculator) continue;
    other->drafts = std::make_shared<Drafts>(Drafts{{}, speculator->acceptance()});
    other->drafts->known.push(other->work->prompt);
  }
  const Clock::time_point now = Clock::now();
  for (const AnswerPtr& other : answers) {
    SpeculatedRow row = taken(other, logits.data());
    push(other, row, now);
  }
}

// Returns whose prompt goes on: in turn the one that came first, and the one with the fewest tokens left.
Scheduler::State::AnswerPtr Scheduler::State::next_prompt() {
  const std::vector<AnswerPtr> answers = starting();
  if (answers.empty()) return nullptr;
  if (++turn % 2 == 1) return answers.front();
  return *std::min_element(answers.begin(), answers.end(),
                           [](const AnswerPtr& one, const AnswerPtr& other) { return one->left() < other->left(); });
}

std::vector<Scheduler::State::AnswerPtr> Scheduler::State::starting() const {
  std::vector<AnswerPtr> found;
  for (const AnswerPtr& answer : running) {
    if (answer->ready) continue;
    const auto is_same = [&](const AnswerPtr& other) { return other->work == answer->work; };
    if (!shared || std::none_of(found.begin(), found.end(), is_same)) found.push_back(answer);
  }
  return found;
}

std::vector<float> Scheduler::State::timed_prompt(const Answer& answer, std::int64_t stop, bool last) {
  Batch batch;
  batch.rows = {answer.row};
  batch.tokens = {token_ids(answer, answer.done, stop)};
  batch.depths = {answer.depth()};
  batch.wanted = Wanted::kGiven;
  const std::int64_t count = stop - answer.done;
  batch.places = {last ? std::vector<std::int64_t>{count - 1} : std::vector<std::int64_t>{}};
  batch.chunk = {count, false};
  const Clock::time_point begun = Clock::now();
  StepResult result = executor.run(*cache, batch);
  watch.ran(count, 1, seconds_between(begun, Clock::now()));
  return std::move(result.logits.front());
}

AnswerGroup Scheduler::State::with_copies(const AnswerPtr& answer) {
  AnswerGroup answers;
  for (const AnswerPtr& other : running) {
    if (other->work != answer->work) continue;
    answers.push_back(other);
    if (other == answer) continue;
    cache->copy_prefix(cache->mark(answer->row), other->row);
    other->done = answer->done;
    other->chain.reset();
    other->saved = answer->saved;
    other->entries = answer->entries;
  }
  return answers;
}

// Runs a decode step of all answers whose prompts have run, a call for each depth.
void Scheduler::State::decode() {
  std::vector<AnswerGroup> ready = groups();
  if (ready.empty()) return;
  if (!alone) {
    std::vector<AnswerGroup> all = ready;
    AnswerGroup& others = all.emplace_back();
    std::copy_if(running.begin(), running.end(), std::back_inserter(others),
                 [](const AnswerPtr& answer) { return !answer->ready; });
    arrange(*cache, all);
  }
  for (AnswerGroup& group : ready) {
    if (alone) {
      for (const AnswerPtr& answer : group) decode_rows({answer});
      continue;
    }
    std::sort(group.begin(), group.end(),
              [](const AnswerPtr& one, const AnswerPtr& other) { return one->row < other->row; });
    decode_rows(group);
  }
}

std::vector<AnswerGroup> Scheduler::State::groups() const {
  std::vector<AnswerGroup> found;
  for (const AnswerPtr& answer : running) {
    if (!answer->ready || answer->tokens.empty()) continue;
    const auto group = std::find_if(found.begin(), found.end(), [&](const AnswerGroup& other) {
      return other.front()->depth().name == answer->depth().name;
    });
    if (group != found.end()) {
      group->push_back(answer);
    } else {
      found.push_back({answer});
    }
  }
  return found;
}

// Runs a decode step of some answers; if it fails, each alone, and ends those that fail.
void Scheduler::State::decode_rows(const AnswerGroup& answers) {
  Rows stepped;
  double seconds = 0;
  try {
    seconds = speculator ? step_with_drafts(answers, stepped) : step_without(answers, stepped);
  } catch (const Error& error) {
    if (answers.size() == 1) {
      fail(*answers.front(), error);
      return;
    }
    stepped.clear();
  }
  if (stepped.empty()) {
    for (const AnswerPtr& answer : answers) {
      if (runs(answer)) decode_rows({answer});
    }
    return;
  }
  const Clock::time_point now = Clock::now();
  watch.ran(0, static_cast<std::int64_t>(answers.size()), seconds);
  for (std::size_t place = 0; place < answers.size(); ++place) push(answers[place], stepped[place], now);
}

double Scheduler::State::step_with_drafts(const AnswerGroup& answers, Rows& stepped) {
  for (const AnswerPtr& answer : answers) {
    SpeculatedRow& row = stepped.emplace_back();
    row.request = answer->request;
    row.row = answer->row;
    row.token = answer->tokens.back();
    row.known = &answer->drafts->known;
    row.acceptance = &answer->drafts->acceptance;
    // The entries of a whole chunk are saved, so no step goes beyond its end.
    const std::int64_t room = answer->saved + chunks.size(answer->saved) - cache->position(answer->row);
    row.most_drafts = answer->chain ? room - 1 : kMostDrafts;
  }
  speculator->step(*cache, stepped);
  return speculator->engine_seconds();
}

double Scheduler::State::step_without(const AnswerGroup& answers, Rows& stepped) {
  std::vector<std::int64_t> its_rows, latest;
  std::vector<Depth> depths;
  for (const AnswerPtr& answer : answers) {
    its_rows.push_back(answer->row);
    latest.push_back(answer->tokens.back());
    depths.push_back(answer->depth());
  }
  const Clock::time_point begun = Clock::now();
  const float* logits = executor.decode(*cache, its_rows, latest, depths);
  const double seconds = seconds_between(begun, Clock::now());
  for (const AnswerPtr& answer : answers) {
    stepped.push_back(taken(answer, logits));
    logits += executor.manifest().model.vocab_size;
  }
  return seconds;
}

SpeculatedRow Scheduler::State::taken(const AnswerPtr& answer, const float* logits) {
  Drafts none;
  Drafts& drafts = answer->drafts ? *answer->drafts : none;
  SpeculatedRow row;
  row.request = answer->request;
  row.row = answer->row;
  row.known = &drafts.known;
  row.acceptance = &drafts.acceptance;
  take(row, logits, executor.manifest().model.vocab_size, {});
  row.known = nullptr;
  row.acceptance = nullptr;
  return row;
}

void Scheduler::State::push(const AnswerPtr& answer, SpeculatedRow& row, Clock::time_point now) {
  if (!runs(answer)) return;  // another answer of its request has failed
  if (row.error) {
    try {
      std::rethrow_exception(row.error);
    } catch (const Error& error) {  // options that leave no token are not the engine's failure
      fail(*answer, error, dynamic_cast<const NotFinite*>(&error) != nullptr);
    }
    return;
  }
  bool first = answer->tokens.empty();
  auto from_end = static_cast<std::int64_t>(row.pieces.size());
  std::optional<Finish> finish;
  for (Piece& piece : row.pieces) {
    piece.layers = last_layers(*cache, answer->row, answer->depth(), !first, from_end--);
    finish = piece.finish;
    answer->tokens.push_back(piece.token);
    delivery_of(answer->work).pieces.push_back(std::move(piece));
    watch.answered(*answer, seconds_between(first ? answer->work->arrived : answer->latest, now), first);
    answer->latest = now;
    first = false;
  }
  if (answer->drafts) {
    answer->drafted = answer->drafts->acceptance.drafted();
    answer->accepted = answer->drafts->acceptance.accepted();
  }
  save(*answer);
  if (!finish) return;
  gauges.failures = 0;
  release(answer, name_of(*finish));
  const auto is_same = [&](const AnswerPtr& other) { return other->work == answer->work; };
  delivery_of(answer->work).done = std::none_of(running.begin(), running.end(), is_same);
}

// Keeps the entries of an answer's latest tokens for other prompts, when another chunk is complete.
void Scheduler::State::save(Answer& answer) {
  const std::int64_t seen = cache->position(answer.row), chunk = chunks.size(answer.saved);
  if (!prefixes || !answer.chain || seen - answer.saved < chunk) return;
  const bool generated = seen > static_cast<std::int64_t>(answer.work->prompt.size());
  if (seen - answer.saved != chunk || (generated && answer.depth().keep != answer.depth().prompt)) {
    answer.chain.reset();  // its tokens ran in other layers than those of a prompt would
    return;
  }
  const PrefixStore::Key key = PrefixStore::key(*answer.chain, token_ids(answer, answer.saved, seen));
  if (!prefixes->has(key)) prefixes->add(*answer.chain, key, cache->save(answer.row, answer.entries, answer.saved));
  answer.chain = key;
  answer.saved = seen;
  answer.entries = cache->lengths(answer.row);
}

}  // namespace dynexport

// Moves of answers between rows.
#include "serving/rows.hpp"

#include <algorithm>
#include <map>
#include <utility>

namespace dynexport {
namespace {

using Move = std::pair<Answer*, std::int64_t>;

std::vector<Move> moves_of(const std::vector<AnswerGroup>& groups) {
  std::vector<Move> moves;
  std::int64_t first = 0;
  for (const AnswerGroup& group : groups) {
    const std::int64_t end = first + static_cast<std::int64_t>(group.size());
    const auto is_own = [first, end](std::int64_t row) { return first <= row && row < end; };
    std::int64_t target = first;
    for (const auto& answer : group) {
      if (is_own(answer->row)) continue;
      const auto is_taken = [&](const auto& other) { return other->row == target; };
      while (std::any_of(group.begin(), group.end(), is_taken)) ++target;
      moves.emplace_back(answer.get(), target++);
    }
    first = end;
  }
  return moves;
}

}  // namespace

void arrange(KvCache& cache, const std::vector<AnswerGroup>& groups) {
  const std::vector<Move> moves = moves_of(groups);
  if (moves.empty() || cache.free_rows().empty()) return;
  std::map<std::int64_t, Answer*> at;
  for (const AnswerGroup& group : groups) {
    for (const auto& answer : group) at[answer->row] = answer.get();
  }
  const auto move = [&](Answer& answer, std::int64_t target) {
    cache.move(answer.row, target);
    at.erase(answer.row);
    answer.row = target;
    at[target] = &answer;
  };
  for (const auto& [answer, target] : moves) {
    const auto other = at.find(target);
    if (other != at.end()) move(*other->second, cache.free_rows().back());
    move(*answer, target);
  }
}

}  // namespace dynexport

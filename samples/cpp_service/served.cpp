#include "served.hpp"

#include <ctime>

#include "api_error.hpp"

namespace service {
namespace {

constexpr char kBetween = '@';
constexpr std::size_t kShown = 80;

}  // namespace

Served::Served(std::string name, std::unique_ptr<dynexport::Worker> worker)
    : name_(std::move(name)),
      worker_(std::move(worker)),
      recommended_(dynexport::recommended_by(worker_->model().bundle())),
      created_(static_cast<std::int64_t>(std::time(nullptr))) {}

std::vector<dynexport::Depth> Served::depths() const {
  const dynexport::Manifest& manifest = model().manifest();
  std::vector<dynexport::Depth> all = {manifest.full()};
  all.insert(all.end(), manifest.depths.begin(), manifest.depths.end());
  return all;
}

std::vector<Json> Served::described() const {
  Json depths = Json::array();
  for (const dynexport::Depth& depth : this->depths()) {
    depths.push_back({{"name", depth.name},
                      {"ratio", depth.ratio ? Json(*depth.ratio) : Json(nullptr)},
                      {"layers", depth.keep.size()},
                      {"trained", depth.trained}});
  }
  const Json entry = {{"id", name_},
                      {"object", "model"},
                      {"created", created_},
                      {"owned_by", "dynexport"},
                      {"max_model_len", tokens()},
                      {"layers", model().manifest().model.layers},
                      {"depths", depths}};
  std::vector<Json> entries = {entry};
  for (const Json& depth : depths) {
    entries.push_back(entry);
    entries.back()["id"] = name_ + kBetween + depth["name"].get<std::string>();
  }
  return entries;
}

dynexport::Depth Served::depth(const std::optional<std::string>& wanted) const {
  try {
    return model().bundle().depth(wanted);
  } catch (const dynexport::Error&) {
    std::string names;
    for (const dynexport::Depth& depth : depths()) names += (names.empty() ? "" : ", ") + depth.name;
    throw dynexport::Error("depth: expected one of " + names + ", found " + beginning(wanted.value_or("none"), kShown));
  }
}

const Served* Directory::named(const std::string& name) const {
  for (const auto& served : models_) {
    if (served->name() == name) return served.get();
  }
  return nullptr;
}

Directory::Found Directory::find(const std::string& name, const std::optional<std::string>& depth) const {
  std::optional<std::string> suffix;
  const Served* served = named(name);
  const std::size_t between = name.rfind(kBetween);
  if (served == nullptr && between != std::string::npos) {
    served = named(name.substr(0, between));
    if (between + 1 < name.size()) suffix = name.substr(between + 1);
  }
  if (served == nullptr) {
    std::string known;
    for (const auto& one : models_) known += (known.empty() ? "" : ", ") + one->name();
    throw ApiError(404, "model: expected one of " + known + ", found " + beginning(name, kShown))
        .param("model")
        .code("model_not_found");
  }
  dynexport::Depth by_name;
  try {
    by_name = served->depth(suffix);
  } catch (const dynexport::Error& error) {
    throw ApiError(404, error.what()).param("model").code("model_not_found");
  }
  const dynexport::Depth by_field = served->depth(depth);
  if (suffix && depth && by_field.name != by_name.name) {
    throw wrong_field("depth", "expected " + *suffix + ", as the model's name says, found " + *depth);
  }
  return {served, suffix ? by_name : by_field};
}

}  // namespace service

#include "keys.hpp"

#include <openssl/crypto.h>
#include <openssl/sha.h>
#include <strings.h>

#include <array>
#include <fstream>
#include <sstream>

#include "api_error.hpp"
#include "dynexport/error.hpp"

namespace service {
namespace {

constexpr std::size_t kMostBytes = 1U << 20U;

using Digest = std::array<unsigned char, SHA256_DIGEST_LENGTH>;

Digest digest_of(const std::string& text) {
  Digest digest{};
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest.data());
  return digest;
}

}  // namespace

std::vector<std::string> read_keys(const std::filesystem::path& path) {
  std::error_code failed;
  const bool plain = std::filesystem::is_regular_file(path, failed);
  std::ifstream file(path, std::ios::binary);
  std::string content(kMostBytes, '\0');
  file.read(content.data(), static_cast<std::streamsize>(content.size()));
  content.resize(static_cast<std::size_t>(file.gcount()));
  if (!plain || !file.eof()) {
    throw dynexport::Error(path.string() + ": expected a readable file of at most " + std::to_string(kMostBytes) +
                           " bytes");
  }
  std::vector<std::string> keys;
  std::istringstream words(content);
  for (std::string key; words >> key;) {
    // The HTTP library decodes %41 in headers.
    if (key.find('%') != std::string::npos) {
      throw dynexport::Error(path.string() + ": expected keys without the character %, found one");
    }
    keys.push_back(key);
  }
  if (keys.empty()) throw dynexport::Error(path.string() + ": expected API keys, one per line, found none");
  return keys;
}

void check_key(const std::vector<std::string>& keys, const std::string& authorization) {
  if (keys.empty()) return;
  const std::size_t space = authorization.find(' ');
  const bool bearer = ::strcasecmp(authorization.substr(0, space).c_str(), "bearer") == 0;
  const std::size_t begin =
      authorization.find_first_not_of(' ', space == std::string::npos ? authorization.size() : space);
  std::string given = begin == std::string::npos ? "" : authorization.substr(begin);
  given.erase(given.find_last_not_of(" \t") + 1);
  const Digest digest = digest_of(given);
  int known = 0;
  for (const std::string& key : keys) {
    known += CRYPTO_memcmp(digest.data(), digest_of(key).data(), digest.size()) == 0 ? 1 : 0;
  }
  if (known != 0 && bearer) return;
  throw ApiError(401, authorization.empty() ? "You didn't provide an API key" : "Incorrect API key provided")
      .code("invalid_api_key")
      .header("WWW-Authenticate", "Bearer");
}

}  // namespace service

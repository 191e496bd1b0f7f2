#include "bundle/sha256.hpp"

#include "dynexport/error.hpp"

namespace dynexport {
namespace {

constexpr std::size_t kBytes = 32;

void require(int done) {
  if (done != 1) throw Error("libcrypto: expected it to compute a sha256, found that it cannot");
}

}  // namespace

Sha256::Sha256() : context_(EVP_MD_CTX_new(), &EVP_MD_CTX_free) {
  require(context_ ? EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) : 0);
}

void Sha256::add(const void* bytes, std::size_t count) { require(EVP_DigestUpdate(context_.get(), bytes, count)); }

std::string Sha256::bytes() {
  unsigned char digest[kBytes];
  require(EVP_DigestFinal_ex(context_.get(), digest, nullptr));
  return {reinterpret_cast<const char*>(digest), kBytes};
}

std::string Sha256::hex() {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const char byte : bytes()) {
    const auto value = static_cast<unsigned char>(byte);
    text += {kDigits[value >> 4U], kDigits[value & 15U]};
  }
  return text;
}

}  // namespace dynexport

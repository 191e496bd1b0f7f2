// SHA-256, by libcrypto.
#pragma once

#include <openssl/evp.h>

#include <cstddef>
#include <memory>
#include <string>

namespace dynexport {

// The hash of bytes that are added piece by piece. Throws Error where libcrypto cannot compute it.
class Sha256 {
 public:
  Sha256();
  void add(const void* bytes, std::size_t count);
  // The hash, 32 bytes; nothing can be added after it.
  std::string bytes();
  // The hash in hexadecimal; as ``bytes``.
  std::string hex();

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

}  // namespace dynexport

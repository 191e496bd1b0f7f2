// Parses the bodies of requests, for tests: a line in is a kind and a body in hexadecimal, a line out is its error or
// {}.
#include <iostream>
#include <string>

#include "api_error.hpp"
#include "requests.hpp"

namespace {

std::string bytes_of(const std::string& hexadecimal) {
  std::string bytes;
  for (std::size_t at = 0; at + 1 < hexadecimal.size(); at += 2) {
    bytes += static_cast<char>(std::stoi(hexadecimal.substr(at, 2), nullptr, 16));
  }
  return bytes;
}

void parse(const std::string& kind, const std::string& text) {
  const service::Json body = service::parse_body(text);
  if (kind == "completion") {
    service::completion_body(body);
  } else if (kind == "chat") {
    service::chat_body(body);
  } else if (kind == "tokenize") {
    service::tokenize_body(body);
  } else {
    service::detokenize_body(body);
  }
}

}  // namespace

int main() {
  std::string kind, body;
  while (std::cin >> kind >> body) {
    service::Json found = service::Json::object();
    try {
      parse(kind, bytes_of(body));
    } catch (const service::ApiError& error) {
      found = error.body()["error"];
      found["status"] = error.status();
    }
    std::cout << service::written(found) << "\n";
  }
  return 0;
}

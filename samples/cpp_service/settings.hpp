// The bounds of an HTTP server.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace service {

struct HttpSettings {
  // A body that is too large is still read up to this many times its limit, so that its client reads the answer.
  static constexpr std::size_t kReadFurther = 8;

  std::size_t most_bytes = 4U << 20U;  // largest body
  double header_seconds = 10;          // for a client to send the headers of a request
  double read_seconds = 30;            // for a client to send a body
  double stall_seconds = 30;           // for which a client may leave its answer unread
  double request_seconds = 600;        // for a request, waiting included
  double drain_seconds = 30;           // that running requests get when the server is told to stop
  std::size_t requests = 1024;         // at a time, those in the queue included
  std::vector<std::string> keys;       // API keys; none lets everybody in
};

}  // namespace service

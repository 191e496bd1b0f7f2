// Submits a request, and sends its answer to the client as a whole or as a stream of events.
#pragma once

#include "answering.hpp"
#include "server.hpp"

namespace service {

// Answers a request for completions; a client that hangs up cancels it. What was generated and not yet read is bounded
// by the answer's length. Throws ApiError for a request that fails before its first token, and Error as Worker::submit.
void deliver(Exchange& exchange, Answer answer);

}  // namespace service

// The checks that a bundle brings: strings with their ids, and conversations with their texts (docs/bundle.md).
#pragma once

#include "dynexport/bundle.hpp"
#include "dynexport/chat_template.hpp"
#include "dynexport/tokenizer.hpp"

namespace dynexport::text {

// Throws Error if a string of the bundle gets other ids, or another text. A bundle without strings is not checked.
void check_strings(const Bundle& bundle, const Tokenizer& tokenizer);

// Throws Error if the bundle does not say that its template is of the subset of Jinja that runtimes know.
void check_covered(const Bundle& bundle);

// Throws Error if a conversation of the bundle gets another text.
void check_conversations(const Bundle& bundle, const ChatTemplate& chat);

}  // namespace dynexport::text

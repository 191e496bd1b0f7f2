// ONNX Runtime's shared library, opened at run time.
#pragma once

#include <string>

// A linked program would fit one release only, because the library's symbols carry its version.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

namespace dynexport {

// Opens the library at ``path``; an empty path stands for the environment's DYNEXPORT_ONNXRUNTIME, else for
// libonnxruntime.so.1 where the loader looks. A process has one: throws Error for a second one, for a library that
// cannot be opened, and for one that is older than the headers.
void open_onnxruntime(const std::string& path);

// The environment of all sessions; the library must be open.
Ort::Env& onnxruntime_environment();

// A message of the library in one line, of at most 500 characters.
std::string reason_of(const Ort::Exception& error);

}  // namespace dynexport

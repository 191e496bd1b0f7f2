// The streams and graphs of the stand-in for the CUDA driver: nothing happens before somebody waits, and a graph
// repeats what was captured.
#include "cuda_state.hpp"

using namespace standin;  // NOLINT(google-build-using-namespace)

extern "C" {

CUresult cuStreamCreate(CUstream* stream, unsigned) {
  return called("cuStreamCreate", true, [&](State& s) -> CUresult {
    *stream = reinterpret_cast<CUstream>(&s.queue);
    s.streams += 1;
    return CUDA_SUCCESS;
  });
}

CUresult cuStreamDestroy_v2(CUstream) {
  return called("cuStreamDestroy", true, [](State& s) -> CUresult {
    s.streams -= 1;
    return CUDA_SUCCESS;
  });
}

CUresult cuStreamSynchronize(CUstream) {
  return called("cuStreamSynchronize", true, [](State& s) -> CUresult {
    if (s.capturing != nullptr) {
      s.broken = true;
      return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    run_queue();
    return s.failed ? refused("work in the stream failed") : CUDA_SUCCESS;
  });
}

CUresult cuStreamBeginCapture_v2(CUstream, CUstreamCaptureMode mode) {
  return called("cuStreamBeginCapture", true, [&](State& s) -> CUresult {
    if (mode != CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) return CUDA_ERROR_INVALID_VALUE;
    if (s.capturing != nullptr || !s.queue.empty()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    s.capturing = new Works;
    s.broken = false;
    return CUDA_SUCCESS;
  });
}

CUresult cuStreamEndCapture(CUstream, CUgraph* graph) {
  return called("cuStreamEndCapture", true, [&](State& s) -> CUresult {
    std::unique_ptr<Works> works(s.capturing);
    s.capturing = nullptr;
    *graph = nullptr;
    if (s.broken || works == nullptr) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    s.captured += 1;
    *graph = reinterpret_cast<CUgraph>(works.release());
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
  return called("cuGraphInstantiate", true, [&](State& s) -> CUresult {
    *executable = reinterpret_cast<CUgraphExec>(new Works(*reinterpret_cast<Works*>(graph)));
    s.graphs += 1;
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphLaunch(CUgraphExec executable, CUstream) {
  return called("cuGraphLaunch", true, [&](State&) -> CUresult {
    for (const Work& work : *reinterpret_cast<Works*>(executable)) enqueue(work);
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphDestroy(CUgraph graph) {
  return called("cuGraphDestroy", true, [&](State& s) -> CUresult {
    delete reinterpret_cast<Works*>(graph);
    s.captured -= 1;
    return CUDA_SUCCESS;
  });
}

CUresult cuGraphExecDestroy(CUgraphExec executable) {
  return called("cuGraphExecDestroy", true, [&](State& s) -> CUresult {
    delete reinterpret_cast<Works*>(executable);
    s.graphs -= 1;
    return CUDA_SUCCESS;
  });
}

CUresult cuLaunchHostFunc(CUstream, CUhostFn function, void* data) {
  return called("cuLaunchHostFunc", true, [&](State&) -> CUresult {
    enqueue([=] { function(data); });
    return CUDA_SUCCESS;
  });
}
}

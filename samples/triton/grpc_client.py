"""Stream a text from Triton over gRPC: grpc_client.py MODEL PROMPT [--depth 2] [--max-tokens 64] [--address ..].

Needs tritonclient[grpc]. Ctrl-C cancels the request; its row is free for another one within a step.
"""

from __future__ import annotations

import argparse
import queue
from typing import Any

import numpy as np
import tritonclient.grpc as grpc


def tensor(name: str, kind: str, dtype: Any, value: Any) -> grpc.InferInput:
    """An input with one value."""
    made = grpc.InferInput(name, [1], kind)
    made.set_data_from_numpy(np.array([value], dtype))
    return made


def main() -> None:
    """Print the text as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("prompt")
    parser.add_argument("--depth", help="a ratio such as 2, a kept set's name, or full")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--address", default="127.0.0.1:8001")
    given = parser.parse_args()

    inputs = [
        tensor("text_input", "BYTES", np.object_, given.prompt.encode()),
        tensor("max_tokens", "INT32", np.int32, given.max_tokens),
        tensor("temperature", "FP32", np.float32, 0),
        tensor("stream", "BOOL", np.bool_, True),
    ]
    if given.depth is not None:
        inputs.append(tensor("depth", "BYTES", np.object_, given.depth.encode()))
    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    client = grpc.InferenceServerClient(given.address)
    # With this header, an error has a status: INVALID_ARGUMENT for the request's own fault, others for the server's.
    headers = {"triton_grpc_error": "true"}
    client.start_stream(lambda result, error: answers.put((result, error)), headers=headers)
    client.async_stream_infer(given.model, inputs, enable_empty_final_response=True)
    try:
        while True:
            result, error = answers.get()
            if error is not None:
                raise SystemExit(f"error: {error}")
            response = result.get_response()
            if response.outputs:
                print(result.as_numpy("text_output")[0].decode(), end="", flush=True)
            if response.parameters["triton_final_response"].bool_param:
                break
    except KeyboardInterrupt:
        client.stop_stream(cancel_requests=True)
    print()


if __name__ == "__main__":
    main()

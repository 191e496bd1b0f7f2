"""Stream a text from Triton over HTTP: http_client.py MODEL PROMPT [--depth 2] [--max-tokens 64] [--address ..].

Needs Python's standard library only. A client that hangs up cancels its request.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request


def main() -> None:
    """Print the text as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("prompt")
    parser.add_argument("--depth", help="a ratio such as 2, a kept set's name, or full")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    given = parser.parse_args()

    body = {"text_input": given.prompt, "max_tokens": given.max_tokens, "temperature": 0, "stream": True}
    if given.depth is not None:
        body["depth"] = given.depth
    address = f"{given.address}/v2/models/{given.model}/generate_stream"
    try:
        with urllib.request.urlopen(address, json.dumps(body).encode()) as events:
            for line in events:
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:  # after the first response, an error is an event
                        raise SystemExit(f"error: {event['error']}")
                    print(event["text_output"], end="", flush=True)
    except urllib.error.HTTPError as error:
        found = error.read().decode().strip().removeprefix("data: ")  # the first response was an error
        raise SystemExit(f"error: {found}") from error
    print()


if __name__ == "__main__":
    main()

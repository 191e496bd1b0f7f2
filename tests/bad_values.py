"""Manifests that are wrong in one value each, and the words that every runtime refuses them with."""

from __future__ import annotations

from typing import Any

NO_JSON = "manifest.json: expected JSON, found something else ("
NO_VERSION = "manifest.json: schema_version: expected 2, found None; convert the model again"

# Contents of the file, by name, and words of the error.
CONTENTS: tuple[tuple[str, bytes, str], ...] = (
    ("empty", b"", NO_JSON),
    ("cut", b"{", NO_JSON),
    ("binary", b"\xff\xfe\x00", NO_JSON),
    ("text", b"not json\nat all", NO_JSON),
    ("two values", b"{} {}", NO_JSON),
    ("a comma too many", b'{"a": 1,}', NO_JSON),
    ("a comment", b"{} // x", NO_JSON),
    ("a line in a string", b'{"a": "\n"}', NO_JSON),
    ("half a character", b'{"a": "\\ud800"}', NO_JSON),
    ("no UTF-8", b'{"a": "\xff"}', NO_JSON),
    ("nested", b"[" * 100_000, NO_JSON),
    ("nested, complete", b"[" * 66 + b"]" * 66, NO_JSON + "more than 64 levels of objects or lists)"),
    ("nested objects", b'{"a":' * 66 + b"0" + b"}" * 66, NO_JSON + "more than 64 levels of objects or lists)"),
    ("a huge number", b'{"a": ' + b"9" * 5000 + b"}", NO_JSON + "a number of 5000 digits)"),
    ("a number of 41 digits", b'{"a": ' + b"9" * 41 + b"}", NO_JSON + "a number of 41 digits)"),
    ("a number beyond floats", b'{"a": 1e999}', NO_JSON + "1e999 is too large a number)"),
    ("NaN", b'{"a": NaN}', NO_JSON),
    ("infinity", b'{"a": -Infinity}', NO_JSON),
    ("a field twice", b'{"schema_version": 2, "schema_version": 2}', NO_JSON + "'schema_version' is there twice)"),
    ("an inner field twice", b'{"a": [{"\\u001b": 1, "\\u001b": 2}]}', NO_JSON + "'\\x1b' is there twice)"),
    ("a list", b"[]", NO_VERSION),
    ("nothing", b"null", NO_VERSION),
    ("a number", b"3", NO_VERSION),
    ("a string", b'"x"', NO_VERSION),
    ("64 levels", b"[" * 65 + b"]" * 65, NO_VERSION),
    ("with a byte order mark", b"\xef\xbb\xbf{}", NO_VERSION),
)

# Versions of the format, and what the error says after "expected 2, found".
VERSIONS: tuple[tuple[object, str], ...] = (
    (0, "0; convert the model again"),
    (1, "1; convert the model again"),
    (3, "3; it was made by a newer dynexport, update this one"),
    ("2", "'2'; convert the model again"),
    (2.0, "2.0; convert the model again"),
    (True, "True; convert the model again"),
    (None, "None; convert the model again"),
    (-1, "-1; convert the model again"),
    ([2], "[2]; convert the model again"),
    ({"a": [None, 1.5, "x"]}, "{'a': [None, 1.5, 'x']}; convert the model again"),
    ("x" * 1000, "'" + "x" * 39 + "; convert the model again"),
)
PATHS: dict[str, Any] = {"kind": "paths", "hops": 3, "min_hops": 0, "exit": True, "reuse": True, "places": "hops"}

# Values of fields: a name, the place, the value, and what the error says about the place.
VALUES: tuple[tuple[str, str, object, str], ...] = (
    ("unknown field", "surprise", 1, "Extra inputs are not permitted"),
    ("another type", "graphs", 3, "Input should be a valid array, found 3"),
    ("no graph", "graphs", [], "Tuple should have at least 1 item after validation, not 0"),
    ("a long value", "model.heads", "x" * 9999, "Input should be a valid integer, found 'xxx"),
    ("no layers", "model.layers", 0, "Input should be greater than or equal to 1, found 0"),
    ("no kept layers", "depths.0.keep", [], "Tuple should have at least 1 item after validation, not 0"),
    ("free of cost", "cost.shared", 0, "Input should be greater than or equal to 1, found 0"),
    ("true for a number", "model.heads", True, "Input should be a valid integer, found True"),
    ("a fraction", "model.heads", 2.0, "Input should be a valid integer, found 2.0"),
    ("text for a number", "model.heads", "2", "Input should be a valid integer, found '2'"),
    ("a number for a switch", "trained", 1, "Input should be a valid boolean, found 1"),
    ("a number for text", "model.family", 3, "Input should be a valid string, found 3"),
    ("a switch for a share", "depths.0.ratio", True, "Input should be a valid number, found True"),
    ("a list for a section", "model", [], "Input should be an object"),
    ("a section for a list", "depths", {}, "Input should be a valid array"),
    ("nothing for a section", "limits", None, "Input should be an object, found None"),
    ("an endless number", "model.heads", 10**30, "Input should be less than 2147483648"),
    ("a number beyond 64 bits", "cost.shared", 1 << 64, "Input should be less than 9223372036854775808"),
    ("a negative count", "cost.kv_per_token", -1, "Input should be greater than or equal to 0, found -1"),
    ("another target", "target", "x", "Input should be 'onnxruntime' or 'tensorrt', found 'x'"),
    (
        "another precision",
        "precision",
        "fp8",
        "Input should be 'fp32', 'fp16', 'bf16', 'int8', 'int4' or 'gguf', found 'fp8'",
    ),
    (
        "another rule of limits",
        "limits.together",
        "maybe",
        "Input should be 'always', 'empty' or 'never', found 'maybe'",
    ),
    ("limits of nothing", "limits.rows", 0, "Input should be greater than or equal to 1, found 0"),
    ("an unknown field inside", "graphs.0.more", "\x1b[31m", "Extra inputs are not permitted, found '\\x1b[31m'"),
    ("another phase", "programs.0.phase", "x", "Input should be 'prompt' or 'decode', found 'x'"),
    ("routing of no kind", "routing", {}, "Unable to extract tag using discriminator 'kind'"),
    (
        "routing of another kind",
        "routing",
        {"kind": "x"},
        "Input tag 'x' found using 'kind' does not match any of the expected",
    ),
    ("routing of no object", "routing", 3, "Input should be an object, found 3"),
    ("a source that is none", "source.config", [], "Input should be an object"),
    ("a tool without a version", "tools.x", None, "Input should be a valid string, found None"),
    ("a contract of no strategy", "contract", {}, "Unable to extract tag using discriminator 'strategy'"),
)

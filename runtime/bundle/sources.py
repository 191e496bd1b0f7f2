"""What a bundle was made from, and the size and hash of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dynexport.runtime.bundle.graphs import Part
from dynexport.runtime.bundle.model import Bytes
from dynexport.runtime.bundle.plain_files import hash_plain


class Source(Part):
    """The checkpoint that the bundle was made from.

    Attributes:
        model: path or name that the user gave.
        config_sha256: sha256 of ``config`` as JSON with sorted keys.
        config: content of its config.json, as rewritten by the importer if there was one.
        importer: name of the importer for checkpoints of other routing code; None for a checkpoint that needs none.
        adapter: path of the LoRA adapter that is merged into the weights, as the user gave it; None without one.
    """

    model: str
    config_sha256: str
    config: dict[str, Any]
    importer: str | None = None
    adapter: str | None = None


class File(Part):
    """Size and hash of a file of the bundle.

    Attributes:
        sha256: hash of its content, in hexadecimal.
        bytes: size in bytes.
    """

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Bytes

    @classmethod
    def of(cls, path: Path, expected: str = "a file", *, advice: str = "") -> File:
        """Return size and hash of a regular file, not a link; errors as for ``open_plain``."""
        sha256, size = hash_plain(path, expected, follow=False, advice=advice)
        return cls(sha256=sha256, bytes=size)


__all__ = ["File", "Source"]

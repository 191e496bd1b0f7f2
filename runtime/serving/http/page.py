"""Serve the web page at ``/``: a chat that shows the depth of every token, whose files lie in ``web/``."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from fastapi import APIRouter, Response

# Everything comes from this server, text never becomes markup (trusted types), and no other page may embed it.
CONTENT_SECURITY_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
# Media type of each file of web/.
FILES: Final = {
    "page.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "settings.js": "text/javascript; charset=utf-8",
    "stream.js": "text/javascript; charset=utf-8",
    "answer.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

router = APIRouter(include_in_schema=False)


def path_of(name: str) -> str:
    """Return the URL path of a file of ``web/``."""
    return "/" if name == "page.html" else f"/web/{name}"


def paths() -> frozenset[str]:
    """Return the URL paths of all files; they are readable without an API key."""
    return frozenset(map(path_of, FILES))


def _add(name: str, media_type: str) -> None:
    content = files(__package__).joinpath("web", name).read_bytes()

    def send() -> Response:
        return Response(content, headers=HEADERS, media_type=media_type)

    router.add_api_route(path_of(name), send, methods=["GET", "HEAD"], name=name)


for _name, _media_type in FILES.items():
    _add(_name, _media_type)

__all__ = ["CONTENT_SECURITY_POLICY", "FILES", "HEADERS", "path_of", "paths", "router"]

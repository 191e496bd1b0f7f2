"""Serve the web page at ``/``: a chat that shows the depth of every token, whose files lie in ``web/``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
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
# URL path -> file of web/. Browsers ask for /favicon.ico where they show an answer without a page.
PATHS: Final = {
    "/": "page.html",
    "/favicon.ico": "icon.svg",
    "/web/answer.js": "answer.js",
    "/web/icon.svg": "icon.svg",
    "/web/page.css": "page.css",
    "/web/page.js": "page.js",
    "/web/settings.js": "settings.js",
    "/web/stream.js": "stream.js",
}
MEDIA_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

router = APIRouter(include_in_schema=False)


def _add(path: str, name: str) -> None:
    content = files(__package__).joinpath("web", name).read_bytes()
    media_type = MEDIA_TYPES[Path(name).suffix]

    def send() -> Response:
        return Response(content, headers=HEADERS, media_type=media_type)

    router.add_api_route(path, send, methods=["GET", "HEAD"], name=path)


for _path, _name in PATHS.items():
    _add(_path, _name)

__all__ = ["CONTENT_SECURITY_POLICY", "HEADERS", "MEDIA_TYPES", "PATHS", "router"]

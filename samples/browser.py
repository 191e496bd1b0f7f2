"""Find a Chromium for the web page's tests and pictures; `python samples/browser.py` installs one if there is none.

A Chromium of the system is used as it is. Otherwise Debian's package is installed where we may (apt-get, as root), and
Playwright's own build elsewhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def system_browser() -> str | None:
    """Return the path of an installed Chromium or Chrome, $CHROMIUM first, or None."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a headless browser.

    Raises:
        playwright.sync_api.Error: if there is none; `python samples/browser.py` installs one.
    """
    # Chromium's sandbox does not start as root, which containers often are; the pages are our own.
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as playwright:
        path = system_browser()
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if root else [])
        yield started
        started.close()


def install() -> None:
    """Install a Chromium unless the system has one."""
    if system_browser():
        return
    if shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        package = ["chromium-headless-shell"]
        if subprocess.run(["apt-cache", "show", *package], capture_output=True).returncode == 0:
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            words = ["apt-get", "install", "-qq", "--yes", "--no-install-recommends", *package, "fonts-dejavu-core"]
            subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL)
            return
    subprocess.run([sys.executable, "-m", "playwright", "install", "chromium-headless-shell"], check=True)


if __name__ == "__main__":
    install()
    with browser() as found:
        print(f"browser: {system_browser() or 'of Playwright'} {found.version}")

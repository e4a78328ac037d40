"""A headless Chromium, driven over plain WebDriver: what the tests of the page need and no more."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


def missing() -> str | None:
    """Why no browser can be driven here, or None."""
    absent = [n for n in ("chromedriver",) if not shutil.which(n)]
    if not (shutil.which("chromium") or shutil.which("google-chrome")):
        absent.append("chromium")
    return f"{' and '.join(absent)} not installed: the page was not opened in a browser" if absent else None


class Browser:
    """One window of a session."""

    def __init__(self, address: str) -> None:
        self.address = address

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def open(self, page: Path, fragment: str = "") -> None:
        self.call(
            "POST", "/url", {"url": "about:blank"}
        )  # a change of the fragment alone would not load it again
        self.call("POST", "/url", {"url": page.as_uri() + fragment})
        self.wait("return document.body.dataset.ready === 'yes'")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def set(self, ident: str, value: object, event: str) -> None:
        """A control is given a value, as a hand would."""
        script = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        self.run(script + "e.dispatchEvent(new Event(arguments[2]))", ident, value, event)

    def wait(self, script: str, seconds: float = 30) -> Any:
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)
        return value

    def rest(self) -> None:
        """Until the window has been laid out and drawn anew."""
        script = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()))"
        self.call("POST", "/execute/async", {"script": script, "args": []})

    def size(self, width: int, height: int, *, dark: bool = False, media: str = "") -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._chrome("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._chrome("Emulation.setEmulatedMedia", {"media": media, "features": scheme})

    def _chrome(self, command: str, params: dict[str, Any]) -> Any:
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def move(self, x: float, y: float, *, click: bool = False) -> None:
        """The pointer goes to a place in the window."""
        steps = [{"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}]
        if click:
            steps += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self.call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": steps}]})

    def press(self, *keys: str) -> None:
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": steps}]})

    def complaints(self) -> list[str]:
        """Whatever the console received since the last call."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def picture(self, path: Path, *, whole: bool = False) -> None:
        if whole:
            shot = self._chrome("Page.captureScreenshot", {"captureBeyondViewport": True})["data"]
        else:
            shot = self.call("GET", "/screenshot")
        path.write_bytes(base64.b64decode(shot))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A session that ends, with its driver and its profile, when the block is left."""
    profile = tempfile.mkdtemp(prefix="polyhead-browser-")
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert driver.stdout is not None
        line = next(line for line in driver.stdout if "started successfully on port" in line)
        address = f"http://127.0.0.1:{line.strip().rstrip('.').split()[-1]}"
        wanted = {
            "browserName": "chrome",
            "goog:loggingPrefs": {"browser": "ALL"},
            "goog:chromeOptions": {"args": [*FLAGS, f"--user-data-dir={profile}"]},
        }
        session = Browser(address).call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        window = Browser(f"{address}/session/{session['sessionId']}")
        try:
            yield window
        finally:
            window.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(timeout=20)
        shutil.rmtree(profile, ignore_errors=True)

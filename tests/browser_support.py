"""A real browser, Chromium, driven over the pipe of its DevTools protocol, for tests of pages."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--hide-scrollbars",
    "--disable-dev-shm-usage",
)  # fmt: skip
_KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "ArrowUp": 38, "Home": 36, "End": 35, "Escape": 27,
         "Enter": 13}  # fmt: skip


class Browser:
    """One page. `messages` is what it said on its console, and what went wrong in its script."""

    def __init__(self, process: "subprocess.Popen[bytes]", writing: int, reading: int) -> None:
        self.messages: list[str] = []
        self._process, self._writing, self._reading = process, writing, reading
        self._buffer, self._number, self._session = b"", 0, ""
        self._loads: list[str] = []  # what has loaded, one after the other
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)
        self.size(1280, 800)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """What the browser answers."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]

    def open(self, page: Path, fragment: str = "") -> None:
        """Load a file, whatever was open before."""
        for url in ("about:blank", page.as_uri() + fragment):  # else another fragment of the same is no load
            loader = self.call("Page.navigate", url=url)["loaderId"]
            while loader not in self._loads:
                self._receive()

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """What is done in the block leads to another page: wait for it."""
        before = len(self._loads)
        yield
        while len(self._loads) == before:
            self._receive()

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        how = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        result = self.call("Runtime.evaluate", expression=script, **how)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys, named as `KeyboardEvent.key`."""
        for key in keys:
            how: dict[str, Any] = {"key": key}
            if key in _KEYS:
                how["windowsVirtualKeyCode"] = _KEYS[key]
            if len(key) == 1:
                how["text"] = key
            self.call("Input.dispatchKeyEvent", type="keyDown", **how)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def size(self, width: int, height: int, *, mobile: bool = False, dark: bool = False) -> None:
        """Have the page be so large, on a phone or not, in dark colours or not."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._reading, 1 << 16)
            assert data, "the browser has ended"
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        match message.get("method"):
            case "Page.lifecycleEvent" if message["params"]["name"] == "load":
                self._loads.append(message["params"]["loaderId"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded":
                self.messages.append(json.dumps(message["params"])[:500])
        return message


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Chromium with an own profile, for the block."""
    (low, writing), (reading, high) = os.pipe(), os.pipe()
    theirs, mine = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (low, high))
    os.close(low)
    os.close(high)
    flags = [*FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    # It reads from descriptor 3 and writes to 4.
    bridge = ["/bin/bash", "-c", f'exec "$@" 3<&{theirs} 4>&{mine}', "-", str(CHROMIUM), *flags]
    process = subprocess.Popen(bridge, pass_fds=[theirs, mine], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(theirs)
    os.close(mine)
    try:
        yield Browser(process, writing, reading)
    finally:
        os.close(writing)
        process.terminate()
        process.wait(30)
        os.close(reading)

"""A real headless Chromium, driven through its own debugging pipe, so that no driver need be installed.

Nothing is ever downloaded: where no Chromium is installed, the tests that need one are skipped. Nothing is reached
either: every host name is unknown to it, and what a page asks for is recorded.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
TIMEOUT = 60.0

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason=f"no browser is installed; looked for {', '.join(NAMES)}")

_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)

# Chromium reads from file descriptor 3 and writes to 4; the pipes' own numbers may be these too.
_AT_3_AND_4 = """
import fcntl, os, sys
above = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(above[0], 3)
os.dup2(above[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """A page in a tab of its own.

    ``console`` has what scripts, the content security policy and failed requests say there, ``requests`` the address
    of everything that was asked for besides the page, ``dialogs`` the text of every alert.
    """

    def __init__(self, browser: "Browser", session: str) -> None:
        self.browser, self.session = browser, session
        self.console: list[str] = []
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self.loaded = False

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.send(method, session=self.session, **parameters)

    def run(self, script: str) -> Any:
        """The value of a script: the body of an async function. It runs whatever the page's policy allows."""
        answer = self.send(
            "Runtime.evaluate",
            expression=f"(async () => {{ {script} }})()",
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait for a condition, an expression in the page."""
        end = time.monotonic() + TIMEOUT
        while not self.run(f"return Boolean({condition});"):
            assert time.monotonic() < end, f"{condition} did not come true; console: {self.console}"
            time.sleep(0.05)

    def press(self, x: float, y: float) -> None:
        """Press and release the mouse, as a person would."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        """A picture of the page, for people to look at."""
        size = self.run("const e = document.documentElement; return [e.clientWidth, e.scrollHeight];")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        shot = self.send("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def hear(self, method: str, said: dict[str, Any]) -> None:
        """Keep what the browser reports about the page."""
        if method == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(a.get("value", a.get("description"))) for a in said["args"]))
        elif method == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.console.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded":
            self.console.append(said["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not said["request"]["url"].startswith(("data:", "blob:")):
            self.requests.append(said["request"]["url"])
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(said["message"])
            self.browser.post("Page.handleJavaScriptDialog", session=self.session, accept=True)
        elif method == "Page.loadEventFired":
            self.loaded = True


class Browser:
    """One running Chromium: messages go in and come out as JSON with a zero byte after each."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._buffer = b""
        self._count = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}

    def open(self, path: Path, *, dark: bool = False, width: int = 900, height: int = 1000) -> Page:
        """Open a local file and wait until it has loaded."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", features=[scheme])
        address = path.resolve().as_uri()
        page.send("Page.navigate", url=address)
        end = time.monotonic() + TIMEOUT
        while not page.loaded:
            self._listen(end)
        assert page.requests[:1] == [address]
        del page.requests[0]
        return page

    def send(self, method: str, *, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Ask, and wait for the answer."""
        number = self.post(method, session=session, **parameters)
        end = time.monotonic() + TIMEOUT
        while number not in self._answers:
            self._listen(end)
        answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        found: dict[str, Any] = answer["result"]
        return found

    def post(self, method: str, *, session: str = "", **parameters: Any) -> int:
        """Ask without waiting."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        data = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        return self._count

    def _listen(self, end: float) -> None:
        """Take in what has come, or wait for it until ``end``."""
        ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
        assert ready, "the browser does not answer"
        received = os.read(self._read, 1 << 16)
        assert received, "the browser has gone"
        *messages, self._buffer = (self._buffer + received).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            elif message.get("sessionId") in self._pages:
                self._pages[message["sessionId"]].hear(message["method"], message.get("params", {}))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A Chromium that keeps its profile in ``folder`` and ends with the block."""
    assert CHROMIUM is not None
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    command = [CHROMIUM, *_OPTIONS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
    process = subprocess.Popen(
        [sys.executable, "-c", _AT_3_AND_4, str(theirs_in), str(theirs_out), *command],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    running = Browser(ours_out, ours_in)
    try:
        yield running
        running.post("Browser.close")
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        os.close(ours_out)
        os.close(ours_in)


__all__ = ["Browser", "Page", "browser", "needs_browser"]

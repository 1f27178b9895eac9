"""A headless Chromium that opens a file, spoken to by the DevTools protocol over a pair of pipes: no port, no further package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from typing import Any

PROGRAM = "chromium"  # Debian's; `make browser` installs it
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip
ABOVE = 10  # 3 and 4 are where Chromium looks for its pipes
TIMEOUT = 120  # seconds that an answer may take: the machine may be busy


class Browser:
    """One process; each `open` is a new tab.

    Raises:
        FileNotFoundError: Chromium is not installed.
        TimeoutError: it does not answer.
    """

    def __init__(self, folder: Path):
        if shutil.which(PROGRAM) is None:
            raise FileNotFoundError(f"{PROGRAM} is not installed: make browser")
        questions, self._to = os.pipe()
        self._from, answers = os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, ABOVE) for end in (questions, answers)]  # or 3<& could close the other
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec {PROGRAM} "$@" 3<&{theirs[0]} 4>&{theirs[1]}', PROGRAM, *OPTIONS, f"--user-data-dir={folder}"],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (questions, answers, *theirs):
            os.close(end)
        self._read, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol; what happens meanwhile goes to `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def wait(self, method: str, session: str) -> None:
        """Until an event has come."""
        while not any(event.get("method") == method and event.get("sessionId") == session for event in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            if not select.select([self._from], [], [], TIMEOUT)[0]:
                raise TimeoutError(f"{PROGRAM} said nothing for {TIMEOUT} s")
            some = os.read(self._from, 1 << 20)
            if not some:
                raise RuntimeError(f"{PROGRAM} ended with {self._process.wait()}")
            self._read += some
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def open(self, file: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> Tab:
        """The file in a window of so many pixels, loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session)
        self.call(
            "Emulation.setDeviceMetricsOverride", session, width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", session, features=[scheme])
        self.call("Page.navigate", session, url=file.resolve().as_uri())
        self.wait("Page.loadEventFired", session)
        return Tab(self, session)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)


class Tab:
    """A page that is open."""

    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self._browser.call("Runtime.evaluate", self._session, expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def picture(self, selector: str = "html") -> bytes:
        """A PNG of the first such element, all of it."""
        box = self.run(
            f"(r => ({{x: r.left + scrollX, y: r.top + scrollY, width: r.width, height: r.height}}))"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        found = self._browser.call(
            "Page.captureScreenshot", self._session, format="png", captureBeyondViewport=True, clip=box | {"scale": 1}
        )
        return base64.b64decode(found["data"])

    @property
    def complaints(self) -> list[str]:
        """What was written to the console, or thrown."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self._events() if event["method"] in kinds]

    @property
    def requests(self) -> list[str]:
        """Addresses that were asked for, data: among them."""
        return [event["params"]["request"]["url"] for event in self._events() if event["method"] == "Network.requestWillBeSent"]

    def _events(self) -> list[dict[str, Any]]:
        self.run("0")  # what was on its way has come by now
        return [event for event in self._browser.events if event.get("sessionId") == self._session]

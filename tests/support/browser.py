"""Headless Chromium by its DevTools protocol over a pipe: no driver, no download, no port."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """Chromium on the PATH; None without one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Pipe:
    """Commands out, answers and events back: one for all tabs of a browser, as its bytes are."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._buffer, self._number = to, back, b"", 0
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None, params: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def wait(self) -> None:
        """Until the browser says something: one event more."""
        self.events.append(self._next())

    def _next(self, seconds: float = 60.0) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._back], [], [], seconds)[0]:
                raise TimeoutError("the browser did not answer")
            read = os.read(self._back, 1 << 16)
            if not read:
                raise RuntimeError("the browser ended")
            self._buffer += read
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)


class Page:
    """One tab: commands out, events kept."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe, self._session = pipe, None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.send(f"{domain}.enable")

    def another(self) -> Page:
        """A second tab of this browser."""
        return Page(self._pipe)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command and its answer. Raises RuntimeError when the browser refuses it."""
        return self._pipe.send(method, self._session, params)

    def open(self, url: str, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Load a page at this width in CSS pixels and wait until it stands."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        events = self._pipe.events
        events[:] = [event for event in events if event.get("sessionId") != self._session]
        self.send("Page.navigate", url=url)
        while not self.of("Page.loadEventFired"):
            self._pipe.wait()
        time.sleep(0.2)  # what a page asks for after loading
        self.evaluate("0")

    def of(self, method: str) -> list[dict[str, Any]]:
        """What this tab told since it was opened."""
        return [
            event["params"]
            for event in self._pipe.events
            if event.get("method") == method and event.get("sessionId") == self._session
        ]

    def evaluate(self, script: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page, however long."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def opened(binary: str, profile: Path) -> Iterator[Page]:
    """A browser for the length of the block; its profile is written to this folder."""
    from_here, to_here = os.pipe(), os.pipe()

    def hand_over() -> None:  # the browser reads 3 and writes 4
        read, write = os.dup(from_here[0]), os.dup(to_here[1])
        os.dup2(read, 3)
        os.dup2(write, 4)

    command = [
        binary, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run",
        "--remote-debugging-pipe", f"--user-data-dir={profile}",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, preexec_fn=hand_over, close_fds=False,  # noqa: PLW1509
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(from_here[0])
    os.close(to_here[1])
    try:
        yield Page(Pipe(from_here[1], to_here[0]))
    finally:
        process.terminate()
        process.wait(timeout=20)
        os.close(from_here[1])
        os.close(to_here[0])

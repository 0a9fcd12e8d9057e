"""A real browser for the tests of pages: headless Chromium, spoken to in its DevTools protocol over a pipe."""

import base64
import itertools
import json
import os
import shutil
import subprocess

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


class Browser:
    """A window without a screen. Use it in a `with` block.

    :ivar complaints: what the page's console and the browser's log have said so far.
    """

    def __init__(self, profile: str):
        commands, ours = os.pipe()
        theirs, answers = os.pipe()

        def connect():  # Chromium reads commands from descriptor 3 and answers on 4
            # Copies out of the way first: the pipes may have these very numbers.
            first, second = os.dup(commands), os.dup(answers)
            high = [os.dup2(first, 63), os.dup2(second, 64)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run")
        self._process = subprocess.Popen(
            [CHROMIUM, *flags, f"--user-data-dir={profile}", "about:blank"],
            close_fds=False,
            preexec_fn=connect,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._commands = os.fdopen(ours, "wb", buffering=0)
        self._answers = os.fdopen(theirs, "rb", buffering=0)
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self._events: list[dict] = []
        self._rest = b""
        self.complaints: list[str] = []

    def __enter__(self) -> "Browser":
        (page,) = (
            target for target in self._call("Target.getTargets")["targetInfos"] if target["type"] == "page"
        )
        attached = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *exc_info) -> None:
        self._process.kill()
        self._process.wait()
        self._commands.close()
        self._answers.close()

    def open(self, url: str, width: int, height: int = 900) -> None:
        """Load a page in a window of this size, and wait until it is complete."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self._events.clear()
        self._call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            self._read()

    def evaluate(self, expression: str):
        """The value of a JavaScript expression, as JSON has it."""
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: str) -> None:
        """The whole page as a PNG file."""
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        with open(path, "wb") as file:
            file.write(base64.b64decode(shot["data"]))

    def _call(self, method: str, **parameters) -> dict:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self._rest:
            part = self._answers.read(65536)
            assert part, "the browser has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self._events.append(message)
            if message["method"] in (
                "Log.entryAdded",
                "Runtime.exceptionThrown",
                "Runtime.consoleAPICalled",
            ):
                self.complaints.append(json.dumps(message["params"]))
        return message

"""A judge behind OpenAI's chat API: retries, a cache of requests by content, no secret on disk."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpo_mlx.errors import ConfigError, FpoError
from fpo_mlx.storage import lines
from fpo_mlx.storage.files import parse_json

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # worth another try
LONGEST_WAIT = 60.0
LARGEST_REPLY = 4 << 20


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could carry the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@dataclass
class Endpoint:
    """Chat completions of one model. `cache` holds requests by content beside the verdicts."""

    url: str
    model: str
    cache: Path
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 6

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._logprobs = True
        self._known: dict[str, Any] = {}
        if self.cache.exists():
            for number, _, line in lines.read_lines(self.cache):
                record = lines.decode(line, f"{self.cache.name}:{number}")
                self._known[str(record.get("request"))] = record.get("reply")
        self._writer = lines.LineWriter(self.cache)

    def close(self) -> None:
        self._writer.close()

    def ask(self, messages: list[dict[str, str]], read: Callable[[Any], Any]) -> Any:
        """What `read` makes of the reply; a reply it refuses (ValueError) is asked for again.

        Raises: ConfigError where asking again cannot help; FpoError after all retries.
        """
        content = {"url": self.url, "model": self.model, "messages": messages}
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        if name in self._known:
            return read(self._known[name])
        reply, found = self._insist(messages, read)
        self._known[name] = reply
        self._writer.append({"request": name, "reply": reply})
        return found

    def _insist(self, messages: list[dict[str, str]], read: Callable[[Any], Any]) -> Any:
        wait, why = 1.0, ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(wait, LONGEST_WAIT))
            try:
                reply = self._reply(messages)
                return _kept(reply), read(_kept(reply))
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}"
                if error.code not in AGAIN:
                    raise ConfigError(self._refused(error)) from None
                wait = max(2.0**attempt, _asked_wait(error))
            except (OSError, http.client.HTTPException, ValueError) as error:
                why = str(getattr(error, "reason", error)) or type(error).__name__
                wait = 2.0**attempt
        raise FpoError(
            f"--judge-url {self.url}: no answer after {self.retries + 1} tries, the last: {why}. "
            "What was judged is kept; run the same command to go on."
        )

    def _reply(self, messages: list[dict[str, str]]) -> Any:
        """One reply. Where log-probs are refused it is asked for without them, from then on."""
        try:
            return self._send(messages)
        except urllib.error.HTTPError as error:
            if error.code not in (400, 422) or not self._logprobs:
                raise
        self._logprobs = False  # it may not know them; that is found out once and is no try
        return self._send(messages)

    def _send(self, messages: list[dict[str, str]]) -> Any:
        body: dict[str, Any] = {
            "model": self.model, "messages": messages, "temperature": 0, "max_tokens": 4,
        }  # fmt: skip
        if self._logprobs:
            body |= {"logprobs": True, "top_logprobs": 10}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with self._opener.open(request, timeout=self.timeout) as response:
            data = response.read(LARGEST_REPLY + 1)
            short = response.length not in (None, 0)
        if short or len(data) > LARGEST_REPLY:
            raise ValueError("the reply was cut off or is too large")
        return parse_json(data)

    def _refused(self, error: urllib.error.HTTPError) -> str:
        hint = "Check the address and --judge-model."
        if error.code in (401, 403):
            hint = f"Set the key in the environment variable {self.key_variable} (--key-variable)."
        return f"--judge-url {self.url} answers HTTP {error.code} {error.reason}. {hint}"


def _kept(reply: Any) -> dict[str, Any]:
    """The part of a reply that is read, and no more."""
    if not isinstance(reply, Mapping):
        raise ValueError("the reply is no object")
    return {"choices": reply.get("choices")}


def _asked_wait(error: urllib.error.HTTPError) -> float:
    try:
        return max(0.0, min(float(error.headers.get("Retry-After") or 0), LONGEST_WAIT))
    except ValueError:  # a date
        return 0.0

"""A judge behind OpenAI's chat API: retries, a cache of requests by content, no secret on disk."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpo_mlx.errors import ConfigError, FpoError
from fpo_mlx.pairs.settings import JudgeConfig
from fpo_mlx.storage import lines
from fpo_mlx.storage.certificates import trusted
from fpo_mlx.storage.files import parse_json

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # worth another try
OF_ONE = (400, 413, 422)  # of one request: too long for the model, or refused for what it says
LONGEST_WAIT = 60.0
LARGEST_REPLY = 4 << 20
TOKENS = 16  # of a reply: an empty thought, a mark and the letter
SHOWN = 200  # characters of what an endpoint says to a refusal

Read = Callable[[Any], tuple[float | None, str]]  # a reply -> (what it says or None, its text)


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
    key_variable: str = JudgeConfig.key_variable
    timeout: float = JudgeConfig.timeout
    retries: int = JudgeConfig.retries

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        https = urllib.request.HTTPSHandler(context=trusted())
        self._opener = urllib.request.build_opener(_NoRedirects, https)
        self._key = os.environ.get(self.key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):  # urllib would print it
            raise ConfigError(
                f"{self.key_variable}: the key has characters that no request can carry. Set it "
                "anew."
            )
        self._logprobs: bool | None = None  # whether it gives them; None: not asked yet
        self._known: dict[str, Any] = {}
        self._name = _digest([self.url, self.model])
        self._answers = False  # it has answered a request, now or before
        if self.cache.exists():
            for number, _, line in lines.read_lines(self.cache):
                record = lines.decode(line, f"{self.cache.name}:{number}")
                self._known[str(record.get("request"))] = record.get("reply")
                self._answers |= record.get("by", self._name) == self._name  # as older ones lack
        self._writer = lines.LineWriter(self.cache)

    def close(self) -> None:
        self._writer.close()

    def ask(self, messages: list[dict[str, str]], read: Read) -> tuple[float | None, str]:
        """What `read` makes of the reply; a reply it refuses (ValueError) is asked for again.

        One that says nothing is not kept: the endpoint may be mended. Nor does a request that is
        refused stop those after it, where others are answered.

        Raises: ConfigError where asking again cannot help; FpoError after all retries.
        """
        name = _digest({"url": self.url, "model": self.model, "messages": messages})
        if name in self._known and (found := read(self._known[name]))[0] is not None:
            return found
        reply, found = self._insist(messages, read)
        if found[0] is not None:
            self._known[name] = reply
            self._writer.append({"request": name, "by": self._name, "reply": reply})
        return found

    def _insist(
        self, messages: list[dict[str, str]], read: Read
    ) -> tuple[Any, tuple[float | None, str]]:
        wait, why = 1.0, ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(wait, LONGEST_WAIT))
            try:
                reply = self._reply(messages)
                return _kept(reply), read(_kept(reply))
            except urllib.error.HTTPError as error:
                with error:  # its connection, too
                    why = self._said(error)
                if error.code in OF_ONE and self._answers:
                    return None, (None, why)
                if error.code not in AGAIN:
                    raise ConfigError(self._refused(error.code, why)) from None
                wait = max(2.0**attempt, _asked_wait(error))
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(getattr(error, "reason", error), ssl.SSLCertVerificationError):
                    raise ConfigError(
                        f"--judge-url {self.url}: its certificate is not trusted: {error}. Name "
                        "the file of whoever signed it in SSL_CERT_FILE."
                    ) from None
                why = str(getattr(error, "reason", error)) or type(error).__name__
                if isinstance(error, TimeoutError):  # of a reply; a connection's is a URLError
                    why += f" (raise --timeout, {self.timeout:g} seconds now, for a slow judge)"
                wait = 2.0**attempt
        raise FpoError(
            f"--judge-url {self.url}: no answer after {self.retries + 1} tries, the last: {why}. "
            "What was judged is kept; run the same command to go on."
        )

    def _reply(self, messages: list[dict[str, str]]) -> Any:
        """One reply. Where log-probs are refused it is asked for without them, from then on."""
        logprobs = self._logprobs is not False
        try:
            reply = self._send(messages, logprobs)
        except urllib.error.HTTPError as error:
            if error.code not in (400, 422) or self._logprobs is not None:
                raise
            error.close()
            logprobs = False  # it may not know them; that is found out once and is no try
            reply = self._send(messages, logprobs)
        self._logprobs, self._answers = logprobs, True
        return reply

    def _send(self, messages: list[dict[str, str]], logprobs: bool) -> Any:
        body: dict[str, Any] = {
            "model": self.model, "messages": messages, "temperature": 0, "max_tokens": TOKENS,
        }  # fmt: skip
        if logprobs:
            body |= {"logprobs": True, "top_logprobs": 10}
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with self._opener.open(request, timeout=self.timeout) as response:
            data = response.read(LARGEST_REPLY + 1)
            short = response.length not in (None, 0)
        if short or len(data) > LARGEST_REPLY:
            raise ValueError("the reply was cut off or is too large")
        reply = parse_json(data)
        if isinstance(reply, Mapping) and reply.get("error") and not reply.get("choices"):
            code = _code_of(reply["error"])
            if code is None:
                said = json.dumps(reply["error"], ensure_ascii=False)
                raise ValueError(f"the error {self._shown(said)}")
            raise urllib.error.HTTPError(
                self.url, code, "within a reply of 200", response.headers, io.BytesIO(data)
            )
        return reply

    def _refused(self, code: int, said: str) -> str:
        hint = "Check --judge-model, and the address, which mostly ends in /v1."
        if code in OF_ONE:
            hint = "Check --judge-model, and that its context holds a prompt and two answers."
        if code in (401, 403):
            hint = f"Set the key in the environment variable {self.key_variable} (--key-variable)."
        return f"--judge-url {self.url} answers {said}. {hint}"

    def _said(self, error: urllib.error.HTTPError) -> str:
        """The refusal and the beginning of its reason."""
        try:
            body = error.read(LARGEST_REPLY).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            body = ""
        shown = self._shown(body)
        return f"HTTP {error.code} {error.reason}" + (f": {shown}" if shown else "")

    def _shown(self, body: str) -> str:
        """Its beginning on one line, without the key."""
        if self._key:
            body = body.replace(self._key, "…")
        return " ".join("".join(c if c.isprintable() else " " for c in body).split())[:SHOWN]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _kept(reply: Any) -> dict[str, Any]:
    """The part of a reply that is read, and no more."""
    if not isinstance(reply, Mapping):
        raise ValueError("the reply is no object")
    return {"choices": reply.get("choices")}


def _code_of(error: Any) -> int | None:
    """The HTTP code that an error within a reply of 200 has, or would have had."""
    code = error.get("code") if isinstance(error, Mapping) else None
    if "unexpected endpoint" in str(error).lower():  # LM Studio's word for a path it has not
        return 404
    return int(str(code)) if re.fullmatch("[45][0-9]{2}", str(code)) else None


def _asked_wait(error: urllib.error.HTTPError) -> float:
    try:
        return max(0.0, min(float(error.headers.get("Retry-After") or 0), LONGEST_WAIT))
    except ValueError:  # a date
        return 0.0

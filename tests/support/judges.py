"""Stub judges and made-up candidates whose better answer is known."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Reply = Callable[[dict[str, Any]], Any]  # a request's body -> what is done with it


def candidates(path: Path, texts: dict[str, list[str]], **more: Any) -> Path:
    """One line for each prompt: its id is its text."""
    rows = [
        {
            "id": prompt, "prompt": prompt, "candidates": [
                {"text": text, "tokens": len(text.split()), "finish": "stop", "logp": -1.0,
                 "seed": 0, "temp": 1.0, "model": "m"} | more
                for text in answers
            ],
        }
        for prompt, answers in texts.items()
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def graded(count: int, n: int = 2) -> dict[str, list[str]]:
    """Prompts whose answers carry their quality in the text, in an order of chance."""
    chance = random.Random(0)
    grades = [chance.sample(range(n), n) for _ in range(count)]
    return {
        f"Question number {i} of many?": [f"answer {i} of grade {g}" for g in order]
        for i, order in enumerate(grades)
    }


def grades(body: dict[str, Any]) -> tuple[int, int]:
    """Of the answers shown first and second in a request."""
    text = body["messages"][-1]["content"]
    first, second = (
        int(
            text.split(f"[Answer {letter}]\n")[1]
            .split(f"\n[End of answer {letter}]")[0]
            .split()[-1]
        )
        for letter in "AB"
    )
    return first, second


def says(letter: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": letter}}]}


@contextmanager
def endpoint(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server on this machine: its address, and the requests it saw (with their headers).

    reply gives the body of a 200, an int for an HTTP error or (error, body), bytes to send as they
    are, or None to close the connection without a word.
    """
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body | {"headers": dict(self.headers), "path": self.path})
            found = reply(body)
            if found is None:
                self.close_connection = True
                self.connection.close()
                return
            status, data = found if isinstance(found, tuple) else (200, found)
            if isinstance(data, int):
                status, data = data, b"{}"
            elif not isinstance(data, bytes):
                data = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

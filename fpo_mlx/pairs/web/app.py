"""Requests to the rating page: who may ask, and what they get."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fpo_mlx.errors import FpoError
from fpo_mlx.pairs.rating import Rating, Refused

HERE = Path(__file__).parent
LARGEST = 8 << 20  # bytes of a request
HEADERS = {
    # no inline script, no other place, no frame around it
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Lets through what comes to this host, from this page, with the token; nothing else."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app, self._token = app, token
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        refusal = self._refusal(Request(scope))
        app = self._app if refusal is None else refusal
        await app(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if host not in self._hosts or (origin is not None and origin != f"http://{host}"):
            return PlainTextResponse("foreign host or origin", 403, HEADERS)
        given = request.headers.get("x-token") or request.query_params.get("token") or ""
        if not secrets.compare_digest(given.encode(), self._token.encode()):
            return PlainTextResponse(
                "wrong token: open the address that `fpo-mlx pairs rate` printed", 401, HEADERS
            )
        if int(request.headers.get("content-length") or 0) > LARGEST:
            return PlainTextResponse("too large", 413, HEADERS)
        return None


def make_app(rating: Rating, token: str, port: int) -> ASGIApp:
    page = Environment(loader=FileSystemLoader(HERE), autoescape=True).get_template("page.html")

    async def show(request: Request) -> Response:
        del request
        return HTMLResponse(page.render(token=token), headers=HEADERS)

    async def part(request: Request) -> Response:
        name = request.url.path.lstrip("/")
        kind = {"page.js": "text/javascript", "page.css": "text/css"}[name]
        return Response((HERE / name).read_bytes(), media_type=kind, headers=HEADERS)

    async def following(request: Request) -> Response:
        del request
        return _json(rating.next())

    async def vote(request: Request) -> Response:
        asked = await _body(request)
        name, choice, edited = (asked.get(key) for key in ("name", "choice", "edited"))
        try:
            if not isinstance(name, str) or not isinstance(choice, str):
                raise Refused("The request is not one of this page.")
            rating.vote(name, choice, _edited(edited))
        except Refused as refusal:
            return _json(rating.next() | {"message": str(refusal)}, 409)
        except FpoError as error:  # a full disk: what was clicked is not written, and said so
            return _json({"message": str(error)}, 507)
        return _json(rating.next())

    async def undo(request: Request) -> Response:
        del request
        try:
            undone = rating.undo()
        except FpoError as error:
            return _json({"message": str(error)}, 507)
        return _json(rating.next() | ({} if undone else {"message": "There is nothing to undo."}))

    routes = [
        Route("/", show), Route("/page.js", part), Route("/page.css", part),
        Route("/next", following, methods=["POST"]), Route("/vote", vote, methods=["POST"]),
        Route("/undo", undo, methods=["POST"]),
    ]  # fmt: skip
    return Guard(Starlette(routes=routes), token, port)


def _json(value: dict[str, Any], status: int = 200) -> Response:
    """ASCII, so that half a surrogate pair in an answer cannot break the reply."""
    return Response(json.dumps(value), status, HEADERS, "application/json")


async def _body(request: Request) -> dict[str, Any]:
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > LARGEST:
            return {}
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _edited(value: Any) -> tuple[int, str] | None:
    if value is None:
        return None
    match value:
        case {"side": 0 | 1 as side, "text": str(text)}:
            return side, text
    raise Refused("The request is not one of this page.")

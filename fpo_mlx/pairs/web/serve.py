"""The server of the rating page: this machine's loopback alone, until it is stopped."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn

from fpo_mlx.errors import ConfigError
from fpo_mlx.pairs.rating import Rating
from fpo_mlx.pairs.web.app import make_app


def serve(rating: Rating, *, port: int, opened: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. port: 0 for any free one; opened: called with the page's address.

    Raises: ConfigError where the port is taken.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--port {port} cannot be used: {error.strerror}. Name another, or leave it out."
        ) from error
    token, port = secrets.token_urlsafe(24), listener.getsockname()[1]
    config = uvicorn.Config(
        make_app(rating, token, port), log_level="warning", access_log=False, server_header=False,
        date_header=False, lifespan="off",
    )  # fmt: skip
    opened(f"http://127.0.0.1:{port}/?token={token}")
    try:
        with suppress(KeyboardInterrupt):  # which it passes on when it has shut down
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        listener.close()

"""What the certificate of an https server is checked by."""

from __future__ import annotations

import ssl


def trusted() -> ssl.SSLContext:
    """The system's store, and certifi's: on a Mac, Python from python.org comes with none."""
    import certifi

    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context

"""The hub without network: fail in a moment and in one line, where the hub's client would retry for a minute."""

from __future__ import annotations

import contextlib
import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator


@contextlib.contextmanager
def quick_hub() -> Iterator[None]:
    """Without name service the hub client retries for 50 s (and writes 20 lines): let it look in its cache only."""
    import huggingface_hub.constants as constants

    log, before = logging.getLogger("huggingface_hub"), constants.HF_HUB_OFFLINE
    level = log.level
    log.setLevel(logging.ERROR)
    constants.HF_HUB_OFFLINE = before or not _reachable(str(constants.ENDPOINT))
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        log.setLevel(level)


def _reachable(url: str) -> bool:
    """Whether the host of `url` has an address, or a proxy would ask for it."""
    if urllib.request.getproxies():
        return True
    try:
        return bool(socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None))
    except OSError:
        return False

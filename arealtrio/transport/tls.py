"""Whom an https server's certificate may be signed by."""

from __future__ import annotations

import ssl

from ..errors import ConfigError


def trust(ca_file: str | None) -> ssl.SSLContext | None:
    """A context that checks servers against the authorities of a file; None for the system's own.

    Args:
        ca_file: Certificate authorities in PEM; they replace the system's.

    Raises:
        ConfigError: If the file can not be read or holds no certificate.
    """
    if ca_file is None:
        return None
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as exc:  # ssl.SSLError is one
        reason = exc.strerror or type(exc).__name__
        raise ConfigError(f"ca_file {ca_file!r} holds no certificates in PEM: {reason}") from exc

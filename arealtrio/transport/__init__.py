"""The only room that opens a connection: pool, time limits, error mapping.

interface       what a transport is: ``Transport``, ``StreamedResponse``
http            ``HttpTransport``, our own pool on trio
httpx_adapter   ``HttpxTransport``: our pool under httpx; ``ClientTransport``: the reverse
exchange        one request and its answer: limits, errors, release
pool            which connection serves next: decisions without I/O
connection      one TCP or TLS connection
parsing         bytes to one answer, without I/O
origin          an address, and the bytes of a request's head
tls             ``trust``: whom an https server's certificate may be signed by
descriptors     ``ensure_descriptors``
"""

from .descriptors import ensure_descriptors
from .http import HttpTransport
from .httpx_adapter import ClientTransport, HttpxTransport
from .interface import RESPONSE_SIZE_BYTES_MAX, StreamedResponse, Transport
from .pool import TransportStatistics
from .tls import trust

__all__ = [
    "RESPONSE_SIZE_BYTES_MAX",
    "ClientTransport",
    "HttpTransport",
    "HttpxTransport",
    "StreamedResponse",
    "Transport",
    "TransportStatistics",
    "ensure_descriptors",
    "trust",
]

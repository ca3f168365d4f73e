"""Whose request it is, from what its connection and its proxies say."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from lawnwatch.serving.clients import ClientMiddleware

pytestmark = pytest.mark.unit


async def client(peer: str, *forwarded: str) -> str:
    """The client of a request from this peer with these X-Forwarded-For lines; 10.0.0.0/8 and fd00::/8 are proxies."""
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["state"]["client"])

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    trusted = [ip_network("10.0.0.0/8"), ip_network("fd00::/8")]
    middleware = ClientMiddleware(app, ring=None, trusted=trusted, on_refused=lambda: None)
    headers = [(b"x-forwarded-for", line.encode()) for line in forwarded]
    scope = {"type": "http", "path": "/predict", "client": (peer, 1), "headers": headers}
    await middleware(scope, nothing, nothing)
    return seen[0]


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("192.0.2.1", ["198.51.100.1"], "192.0.2.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["6.6.6.6, 198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        # HAProxy adds a line of its own below what the client sent.
        ("10.0.0.1", ["6.6.6.6", "198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["6.6.6.6, 7.7.7.7", "198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        ("10.0.0.1", ["nonsense", "10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", ["198.51.100.1", "nonsense"], "10.0.0.1"),
    ],
)
async def test_a_trusted_proxy_names_the_client(peer: str, forwarded: list[str], expected: str) -> None:
    assert await client(peer, *forwarded) == expected


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("2001:db8:1:2::1", [], "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff:ffff:ffff:ffff", [], "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", [], "2001:db8:1:3::/64"),
        ("::ffff:192.0.2.1", [], "192.0.2.1"),
        ("::ffff:10.0.0.1", ["2001:db8:1:2::7"], "2001:db8:1:2::/64"),
        ("fd00::1", ["::ffff:192.0.2.1"], "192.0.2.1"),
        ("fe80::1", [], "fe80::1"),  # all hosts of a link have the same prefix
    ],
)
async def test_a_host_of_ipv6_is_one_client_with_all_its_addresses(
    peer: str, forwarded: list[str], expected: str
) -> None:
    assert await client(peer, *forwarded) == expected

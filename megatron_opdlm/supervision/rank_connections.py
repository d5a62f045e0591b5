"""Connections between rank 0 and every other rank, beside those of the process groups."""

import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from megatron_opdlm.errors import RunError

_HELLO_SECONDS = 10.0  # for the first message of whoever connected


def connect(
    rank: int, ranks: int, timeout_seconds: float, share: Callable[[Any], Any]
) -> dict[int, Connection]:
    """On rank 0 a connection to each other rank, on the others one to rank 0; all call it together.

    ``share`` gives rank 0's value to all. The others find rank 0 at MASTER_ADDR, as the process
    group did, on a free port; a random token that only ranks know keeps strangers out. Raises
    RunError where a rank cannot be reached.
    """
    if ranks == 1:
        return {}
    if rank > 0:
        port, token = share(None)
        return {0: _call(rank, port, token, timeout_seconds)}
    both = socket.has_dualstack_ipv6()
    with socket.create_server(
        ("", 0),
        family=socket.AF_INET6 if both else socket.AF_INET,
        dualstack_ipv6=both,
        backlog=ranks,
    ) as server:
        token = secrets.token_hex(16)
        share((server.getsockname()[1], token))
        return _accept(server, ranks, token, timeout_seconds)


def _call(rank: int, port: int, token: str, timeout_seconds: float) -> Connection:
    host = os.environ["MASTER_ADDR"]
    try:
        line = socket.create_connection((host, port), timeout=timeout_seconds)
    except OSError as error:
        raise RunError(
            f"rank {rank} cannot reach rank 0 at {host}:{port} ({error}); let ranks connect to "
            "each other on all ports"
        ) from None
    connection = _connection(line)
    connection.send_bytes(json.dumps({"token": token, "rank": rank}).encode())
    return connection


def _connection(line: socket.socket) -> Connection:
    line.settimeout(None)  # the descriptor lives on without the socket object
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(line.detach())


def _accept(
    server: socket.socket, ranks: int, token: str, timeout_seconds: float
) -> dict[int, Connection]:
    found: dict[int, Connection] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(found) < ranks - 1:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            line, _ = server.accept()
        except OSError:
            missing = sorted(set(range(1, ranks)) - set(found))
            raise RunError(
                f"rank {missing[0]} did not connect to rank 0 within {timeout_seconds:g} s "
                f"({len(missing)} of {ranks} ranks are missing); see its output"
            ) from None
        connection = _connection(line)
        rank = _read_hello(connection, token)
        if rank is None:
            connection.close()
        else:
            found[rank] = connection
    return found


def _read_hello(connection: Connection, token: str) -> int | None:
    """The rank of whoever connected; None for a stranger."""
    try:
        if not connection.poll(_HELLO_SECONDS):
            return None
        hello = json.loads(connection.recv_bytes(1000))
        known = hmac.compare_digest(str(hello["token"]), token)
        return int(hello["rank"]) if known else None
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None

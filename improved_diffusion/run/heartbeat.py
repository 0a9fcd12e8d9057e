"""The heartbeat of a job with several processes, which detects that one of them has ended.

Rank 0 has a connection to every other process. Both ends send a byte every second. After `PATIENCE` seconds without
a byte, the other process counts as lost, even if its machine lost power and never closed the connection. A timeout
of the collective operations cannot do this: they must be able to wait for hours while rank 0 reads images.
"""

import contextlib
import os
import secrets
import socket
import sys
import threading
import time

PATIENCE = 40  # beats without a byte; at one beat per second, all processes stop within a minute
_TOKEN_BYTES = 16
_RANK_BYTES = 4


class LostContact(ConnectionError):
    """Another process of the job has ended or cannot be reached."""


class Heartbeat(contextlib.AbstractContextManager):
    """A thread that exchanges bytes with other processes until `stop`.

    This process enters the heartbeat, as a context manager, while it waits for the others. If one is lost during
    that time, this process ends with one line on stderr and exit code 2, because nothing else can interrupt the
    wait. If one is lost at another time, the next attempt to wait raises `LostContact`, so that work such as saving a
    checkpoint is finished first.

    :param peers: connected sockets to the heartbeats of other processes, by the names for messages.
    :param interval: seconds between two beats.
    :param patience: beats without a byte after which a process counts as lost.
    """

    def __init__(self, peers: dict[str, socket.socket], interval: float = 1.0, patience: int = PATIENCE):
        self._peers = peers
        self._interval = interval
        self._patience = patience
        self._lost: str | None = None
        self._waiting = False
        self._stopped = threading.Event()
        for peer in peers.values():
            peer.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Heartbeat":
        """Start to wait for the others. :raises LostContact: one is lost already."""
        if self._lost is not None:
            raise LostContact(self._lost)
        self._waiting = True
        return self

    def __exit__(self, *exc_info) -> None:
        self._waiting = False

    def stop(self) -> None:
        """Close the connections. All processes call this at the end, so that none counts as lost."""
        self._stopped.set()
        self._thread.join()
        for peer in self._peers.values():
            peer.close()

    def _run(self) -> None:
        # Silence is counted in beats, not in seconds, so that a job survives being suspended as a whole.
        silent = dict.fromkeys(self._peers, 0)
        while not self._stopped.wait(self._interval):
            for name, peer in self._peers.items():
                silent[name] = 0 if _exchange(peer) else silent[name] + 1
                if silent[name] > self._patience and self._lost is None:
                    self._lost = f"lost contact with {name}: it has ended, or its machine cannot be reached"
            if self._lost is not None and self._waiting:
                print(f"{os.path.basename(sys.argv[0])}: error: {self._lost}", file=sys.stderr, flush=True)
                os._exit(2)


def _exchange(peer: socket.socket) -> bool:
    """Send a byte. :return: whether bytes have arrived from the other end."""
    try:
        peer.send(b".")
        return bool(peer.recv(4096))
    except OSError:  # nothing to read yet, or no connection any more
        return False


class Listener:
    """A port of rank 0 for the connections of the others.

    :ivar address: the port and a secret token, which the others need (see `connect`).
    """

    def __init__(self):
        if socket.has_dualstack_ipv6():
            self._server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            self._server = socket.create_server(("", 0))
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self.address = f"{self._server.getsockname()[1]} {self._token.hex()}"

    def accept(self, count: int, timeout: float) -> dict[str, socket.socket]:
        """Wait for `count` connections. :return: them by name. :raises TimeoutError: `timeout` seconds are over."""
        peers: dict[str, socket.socket] = {}
        deadline = time.monotonic() + timeout
        with self._server:
            while len(peers) < count:
                self._server.settimeout(max(deadline - time.monotonic(), 0.01))
                peer, _ = self._server.accept()
                rank = self._read_rank(peer)
                if rank is None:  # a port scanner, for example
                    peer.close()
                else:
                    peers[f"rank {rank}"] = peer
        return peers

    def _read_rank(self, peer: socket.socket) -> int | None:
        peer.settimeout(5)
        length = _TOKEN_BYTES + _RANK_BYTES
        greeting = b""
        with contextlib.suppress(OSError):
            while len(greeting) < length and (part := peer.recv(length - len(greeting))):
                greeting += part
        if len(greeting) < length or not secrets.compare_digest(greeting[:_TOKEN_BYTES], self._token):
            return None
        return int.from_bytes(greeting[_TOKEN_BYTES:], "big")


def connect(host: str, address: str, rank: int, timeout: float) -> dict[str, socket.socket]:
    """Connect to rank 0, from another rank.

    :param host: the machine of rank 0. :param address: of its `Listener`. :param timeout: in seconds.
    :return: the connection, by name.
    :raises OSError: rank 0 cannot be reached.
    """
    port, token = address.split()
    peer = socket.create_connection((host, int(port)), timeout=timeout)
    peer.sendall(bytes.fromhex(token) + rank.to_bytes(_RANK_BYTES, "big"))
    return {"rank 0": peer}

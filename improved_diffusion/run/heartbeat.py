"""Notices that another process of a job is gone, even when its machine vanished without closing a connection.

Rank 0 holds a connection to every other process. Both ends send a byte every second, and whoever hears nothing
for `PATIENCE` seconds gives the other one up. Collective operations cannot tell that by themselves: they may
wait for hours while rank 0 reads images, and for ever for a machine without power.
"""

import contextlib
import os
import secrets
import socket
import sys
import threading
import time

PATIENCE = 40  # beats of silence; with the one-second beat, everybody has stopped within a minute
_TOKEN_BYTES = 16
_RANK_BYTES = 4


class LostContact(ConnectionError):
    """Another process of the job has ended or cannot be reached."""


class Heartbeat(contextlib.AbstractContextManager):
    """A thread that exchanges signs of life with `peers` until `stop`.

    While it is entered, as a context manager, this process waits for the others: if one of them is given up
    then, the process ends with one line on stderr and exit code 1, because nothing else can interrupt the
    wait. Otherwise what is under way, such as saving a checkpoint, is finished first.

    :param peers: by a name for messages, connected sockets whose other ends are watched likewise.
    :param interval: seconds between two beats.
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
        """Begin to wait for the others. :raises LostContact: one was given up already."""
        if self._lost is not None:
            raise LostContact(self._lost)
        self._waiting = True
        return self

    def __exit__(self, *exc_info) -> None:
        self._waiting = False

    def stop(self) -> None:
        """Close the connections. Call it when the others are about to do the same."""
        self._stopped.set()
        self._thread.join()
        for peer in self._peers.values():
            peer.close()

    def _run(self) -> None:
        # Counted in this process's own beats, so that a job that is suspended as a whole survives it.
        silent = dict.fromkeys(self._peers, 0)
        while not self._stopped.wait(self._interval):
            for name, peer in self._peers.items():
                silent[name] = 0 if _exchange(peer) else silent[name] + 1
                if silent[name] > self._patience and self._lost is None:
                    self._lost = f"lost contact with {name}: it has ended, or its machine cannot be reached"
            if self._lost is not None and self._waiting:
                print(f"{os.path.basename(sys.argv[0])}: error: {self._lost}", file=sys.stderr, flush=True)
                os._exit(1)


def _exchange(peer: socket.socket) -> bool:
    """Send a sign of life. :return: whether there was one from the other end."""
    try:
        peer.send(b".")
        return bool(peer.recv(4096))
    except OSError:  # nothing to read yet, or no connection any more
        return False


class Listener:
    """Rank 0's end before the connections exist: a port for the others, at `address` to be told to them."""

    def __init__(self):
        if socket.has_dualstack_ipv6():
            self._server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            self._server = socket.create_server(("", 0))
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self.address = f"{self._server.getsockname()[1]} {self._token.hex()}"

    def accept(self, count: int, timeout: float) -> dict[str, socket.socket]:
        """The connections of `count` processes, by name. :raises TimeoutError: they do not come in time."""
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
    """Another rank's connection to rank 0's `Listener` on `host`, by name. :raises OSError: there is none."""
    port, token = address.split()
    peer = socket.create_connection((host, int(port)), timeout=timeout)
    peer.sendall(bytes.fromhex(token) + rank.to_bytes(_RANK_BYTES, "big"))
    return {"rank 0": peer}

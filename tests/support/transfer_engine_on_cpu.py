# SPDX-License-Identifier: Apache-2.0
"""Mooncake's transfer engine in Python: writes of one process to the memory of another, over a TCP connection.

SGLang's own code for mooncake does everything else. So a test needs no library of RDMA, counts every byte that goes
from one server to the other, and can let a transfer fail, or wait. With KVARN_TEST_MOONCAKE=1 the bytes go through
mooncake itself, where it is installed, and no fault happens.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

# a folder in which a test turns faults on, and in which senders write down what they sent
FOLDER, REAL = "KVARN_TEST_TRANSFERS", "KVARN_TEST_MOONCAKE"
# transfers that wait; that fail; that end half way, with the process of the sender; that the receiver's end does not
# survive
LATE, LOST, SENDER_DIES, RECEIVER_DIES = "late", "lost", "sender dies", "receiver dies"
SENT = "sent"
_BLOCK = struct.Struct("<QQ")
_OK, _FAILED = b"\0", b"\1"


def install() -> None:
    """Put the stand-in in the place of mooncake."""
    if os.environ.get(REAL) != "1":
        package, module = ModuleType("mooncake"), ModuleType("mooncake.engine")
        package.engine, module.TransferEngine = module, TransferEngine
        sys.modules |= {"mooncake": package, "mooncake.engine": module}


def _is_on(fault: str) -> bool:
    return (Path(os.environ[FOLDER]) / fault).exists()


def _note(fault: str) -> None:
    (Path(os.environ[FOLDER]) / f"{fault} happened").touch()


class TransferEngine:
    """What SGLang calls of mooncake.engine.TransferEngine."""

    def __init__(self) -> None:
        # address -> bytes
        self._regions: dict[int, int] = {}
        self._peers: dict[str, socket.socket] = {}
        self._lock = threading.Lock()

    def initialize(self, host: str, handshake: str, protocol: str, device: str) -> int:
        assert protocol == "tcp", f"expected MOONCAKE_PROTOCOL=tcp, got {protocol}"
        self._server = socket.create_server((host, 0))
        threading.Thread(target=self._accept, daemon=True).start()
        return 0

    def get_rpc_port(self) -> int:
        return self._server.getsockname()[1]

    def batch_register_memory(self, addresses: list[int], sizes: list[int]) -> int:
        self._regions |= dict(zip(addresses, sizes, strict=True))
        return 0

    def batch_unregister_memory(self, addresses: list[int]) -> int:
        for address in addresses:
            del self._regions[address]
        return 0

    def batch_transfer_sync_write(
        self, session: str, sources: list[int], targets: list[int], sizes: list[int]
    ) -> int:
        """Write each source to its target in the process of a session; return 0 once all are there, else -1."""
        while _is_on(LATE):
            _note(LATE)
            time.sleep(0.02)
        if _is_on(LOST):
            _note(LOST)
            return -1
        try:
            with self._lock:
                self._send(session, sources, targets, sizes)
        except OSError:
            self._peers.pop(session, None)
            return -1
        self._write_down(sources, sizes)
        return 0

    def send_probe(self, session: str) -> int:
        """Return 0 if the process of a session is there."""
        host, port = session.rsplit(":", 1)
        try:
            socket.create_connection((host, int(port))).close()
        except OSError:
            return -1
        return 0

    def _send(self, session: str, sources: list[int], targets: list[int], sizes: list[int]) -> None:
        if session not in self._peers:
            host, port = session.rsplit(":", 1)
            self._peers[session] = socket.create_connection((host, int(port)))
        peer = self._peers[session]
        for n, (source, target, size) in enumerate(zip(sources, targets, sizes, strict=True)):
            self._region(source, size)
            if n and _is_on(SENDER_DIES):
                _note(SENDER_DIES)
                os._exit(1)
            peer.sendall(_BLOCK.pack(target, size))
            peer.sendall((ctypes.c_char * size).from_address(source))
        peer.sendall(_BLOCK.pack(0, 0))
        if peer.recv(1) != _OK:
            raise ConnectionError("the receiver took no bytes at an address")

    def _region(self, address: int, size: int) -> int:
        """Return the size of the registered region in which these bytes are; only such may be read and written."""
        for start, length in self._regions.items():
            if start <= address and address + size <= start + length:
                return length
        raise ConnectionError(f"{size} bytes at {address} are in no registered region")

    def _write_down(self, sources: list[int], sizes: list[int]) -> None:
        # bytes by the size of the region from which they came
        found: dict[int, int] = {}
        for source, size in zip(sources, sizes, strict=True):
            region = self._region(source, size)
            found[region] = found.get(region, 0) + size
        with (Path(os.environ[FOLDER]) / SENT).open("a") as file:
            file.write(json.dumps(found) + "\n")

    def _accept(self) -> None:
        while True:
            connection, _ = self._server.accept()
            threading.Thread(target=self._receive, args=(connection,), daemon=True).start()

    def _receive(self, connection: socket.socket) -> None:
        answer = _OK
        while header := _read(connection, bytearray(_BLOCK.size)):
            address, size = _BLOCK.unpack(header)
            if size == 0:
                connection.sendall(answer)
                answer = _OK
                continue
            if _is_on(RECEIVER_DIES):
                _note(RECEIVER_DIES)
                os._exit(1)
            try:
                self._region(address, size)
                target = (ctypes.c_char * size).from_address(address)
            except ConnectionError:
                answer, target = _FAILED, bytearray(size)
            _read(connection, target)


def _read(connection: socket.socket, target: bytearray | ctypes.Array) -> bytearray | ctypes.Array | None:
    """Fill the target; return it, or None where the connection ends."""
    view = memoryview(target).cast("B")
    while len(view):
        if not (count := connection.recv_into(view)):
            return None
        view = view[count:]
    return target

"""Frames between two machines that share a secret: each one is authenticated, and none is unpickled.

Opening: both sides prove that they know the secret by an HMAC over both sides' random numbers (challenge and response);
keys for the frames of either direction follow from the same numbers, so a recorded connection opens no other one.
A frame is its length (uint32), its kind (uint8), its bytes, and HMAC-SHA256 over its number in the connection, its
header and its bytes: one that is altered, repeated, left out or out of order ends the connection. Nothing is encrypted.
"""

import hashlib
import hmac
import os
import socket
import struct
import threading
from contextlib import suppress
from typing import Any

_MAGIC = b"jaxserve-plan-1\n"
_HELLO = struct.Struct(f"<{len(_MAGIC)}sI32s")  # magic, rank, random
_RANDOM = 32
_HEADER = struct.Struct("<IB")
_NUMBER = struct.Struct("<Q")
_TAG = hashlib.sha256().digest_size
MAX_BYTES = 1 << 28  # of a frame: masks of 8 ranks x 256 rows x 256k tokens are 64 MiB


class ChannelError(ConnectionError):
    """The other side is gone, is not who it should be, or sent what it should not."""


class Channel:
    """One side of an opened connection. send() may be called from any thread, receive() from one."""

    def __init__(self, connection: socket.socket, send_key: bytes, receive_key: bytes):
        self._connection = connection
        self._send_key, self._receive_key = send_key, receive_key
        self._sent = self._received = 0
        self._lock = threading.Lock()

    def send(self, kind: int, payload: Any = b"") -> None:
        """payload: bytes, or an array in C order. Raises OSError."""
        body = bytes(payload)
        if len(body) > MAX_BYTES:
            raise ChannelError(f"a frame of {len(body)} bytes is more than {MAX_BYTES}")
        header = _HEADER.pack(len(body), kind)
        with self._lock:
            tag = hmac.digest(self._send_key, _NUMBER.pack(self._sent) + header + body, "sha256")
            self._sent += 1
            self._connection.sendall(header + body + tag)

    def receive(self) -> tuple[int, bytes]:
        """The next frame's kind and bytes. Raises ChannelError, OSError."""
        header = _read(self._connection, _HEADER.size)
        length, kind = _HEADER.unpack(header)
        if length > MAX_BYTES:
            raise ChannelError(f"a frame of {length} bytes was announced, more than {MAX_BYTES}")
        body, tag = _read(self._connection, length), _read(self._connection, _TAG)
        wanted = hmac.digest(self._receive_key, _NUMBER.pack(self._received) + header + body, "sha256")
        if not hmac.compare_digest(tag, wanted):
            raise ChannelError(f"frame {self._received} is forged, repeated or out of order")
        self._received += 1
        return kind, body

    def close(self) -> None:
        """Wakes whoever waits in receive(), on both sides."""
        with suppress(OSError):  # the other side was first
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def open_as_follower(connection: socket.socket, secret: bytes, rank: int) -> Channel:
    """The side that connects and proves itself first. Raises ChannelError, OSError (a timeout among them)."""
    hello = _HELLO.pack(_MAGIC, rank, os.urandom(_RANDOM))
    connection.sendall(hello)
    transcript = hello + _read(connection, _RANDOM)
    connection.sendall(_tag(secret, b"follower", transcript))
    try:
        answer = _read(connection, _TAG)
    except ChannelError:
        raise ChannelError("it hung up when it saw the proof of our secret; does it have another one?") from None
    if not hmac.compare_digest(answer, _tag(secret, b"leader", transcript)):
        raise ChannelError("it does not know our secret")
    keys = _keys(secret, transcript)
    return Channel(connection, keys[1], keys[0])


def open_as_leader(connection: socket.socket, secret: bytes) -> tuple[Channel, int]:
    """The side that listens. -> the channel, and the rank that the other side says it has. Raises as the above."""
    hello = _read(connection, _HELLO.size)
    magic, rank, _ = _HELLO.unpack(hello)
    if magic != _MAGIC:
        raise ChannelError("it does not speak this protocol")
    random = os.urandom(_RANDOM)
    connection.sendall(random)
    transcript = hello + random
    if not hmac.compare_digest(_read(connection, _TAG), _tag(secret, b"follower", transcript)):
        raise ChannelError("it does not know our secret")
    connection.sendall(_tag(secret, b"leader", transcript))
    return Channel(connection, *_keys(secret, transcript)), rank


def _keys(secret: bytes, transcript: bytes) -> tuple[bytes, bytes]:
    """Of the frames to the follower, and to the leader."""
    return _tag(secret, b"to the follower", transcript), _tag(secret, b"to the leader", transcript)


def _tag(secret: bytes, purpose: bytes, transcript: bytes) -> bytes:
    return hmac.digest(secret, purpose + b"\n" + transcript, "sha256")


def _read(connection: socket.socket, count: int) -> bytes:
    """Exactly that many bytes. Raises ChannelError when the connection ends before."""
    parts, left = [], count
    while left:
        part = connection.recv(min(left, 1 << 20))
        if not part:
            raise ChannelError("it hung up")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)

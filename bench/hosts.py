"""What it costs rank 0 and a follower that plans are told over an authenticated connection: microseconds a step, by the
size of the plan. The two ends are two processes of this machine, over 127.0.0.1. No device.

python -m bench.hosts [--steps 2000] [--json FILE]
"""

import argparse
import json
import multiprocessing
import socket
import time
from pathlib import Path
from statistics import median

import numpy as np

from jaxserve.engine.channel import Channel, open_as_follower, open_as_leader
from jaxserve.engine.hosts import STEP, STOP
from jaxserve.scheduling.plan import Bucket, StepPlan, packed_size, unpack
from jaxserve.scheduling.wire import decode, encode

SECRET = b"a secret for a benchmark"
# Name -> decode rows, pages per row (M)
SHAPES = {"1 row, 8k in pages of 16": (1, 512), "16 rows, 8k in pages of 16": (16, 512)}
SHAPES |= {"64 rows, 32k in pages of 128": (64, 256), "256 rows, 32k in pages of 128": (256, 256)}


def plan_of(rows: int, max_pages: int) -> StepPlan:
    bucket = Bucket(rows, 0, 0)
    vector = np.arange(packed_size(bucket, max_pages), dtype=np.int32)
    return StepPlan(bucket, vector, unpack(vector, bucket, max_pages), (), (), rows)


def follow(port: int) -> None:
    """The other process: answers each step by the microseconds that receiving (after the header) and decoding took."""
    channel = open_as_follower(_connected(port), SECRET, 1)
    max_pages = 0
    while True:
        kind, body = channel.receive()
        if kind == STOP:
            return
        if kind != STEP:
            max_pages = int.from_bytes(body, "little")
            continue
        began = time.perf_counter()
        decode(np.frombuffer(body, "<i4"), max_pages)
        channel.send(STEP, np.array([1e6 * (time.perf_counter() - began)]))


def _connected(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def measure(channel: Channel, rows: int, max_pages: int, steps: int) -> dict[str, float]:
    plan = plan_of(rows, max_pages)
    channel.send(STEP + 100, max_pages.to_bytes(4, "little"))
    encoding, sending, whole, decoding = [], [], [], []
    for _ in range(steps):
        began = time.perf_counter()
        words = encode(plan)
        encoded = time.perf_counter()
        channel.send(STEP, words)
        sent = time.perf_counter()
        decoding.append(float(np.frombuffer(channel.receive()[1])[0]))
        encoding.append(encoded - began)
        sending.append(sent - encoded)
        whole.append(time.perf_counter() - began)
    found = {"KiB": words.nbytes / 1024, "encode us": 1e6 * median(encoding), "send us": 1e6 * median(sending)}
    return found | {"decode us": median(decoding), "there and back us": 1e6 * median(whole)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = multiprocessing.get_context("spawn").Process(target=follow, args=(listener.getsockname()[1],))
        other.start()
        connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    channel, _ = open_as_leader(connection, SECRET)
    found = {name: measure(channel, *shape, arguments.steps) for name, shape in SHAPES.items()}
    channel.send(STOP)
    other.join()
    for name, values in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in values.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Does the server hold? Many clients at once for some minutes, half of which leave in the middle, and some of which read slowly.

    PYTHONPATH=.:loaders python3 tools/serve_load.py
    PYTHONPATH=.:loaders python3 tools/serve_load.py --clients 20 --seconds 30 --warm-up 10 -- --model smollm2-135m --threads 1

What follows `--` goes to `offload-sirius serve`. Each client asks, again and again, for a short answer, as a stream or in one
piece. Told to come again (429), it waits as long as it is told. What must hold, by the counters of the server and of this
program: no error but 429; resident memory after the warm-up within 5 % between its least and its most; no slot taken and nobody
waiting when all clients have gone. Exit status: 0 all held, 1 something did not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
MOST_MEMORY_RATIO = 1.05
LEAVING_SHARE, SLOW_SHARE, STREAM_SHARE = 0.5, 0.1, 0.8
SLOW_SECONDS = 0.5
"""Between two reads of a slow reader, each of a few bytes."""

PROMPTS = (
    "Why is the sky blue?",
    "Write a poem about the sea.",
    "What is 17 times 23?",
    "Tell me a story about a fox and a crow.",
    "How do I boil an egg?",
    "Name three rivers in Europe and say where they end.",
)


@dataclass
class Load:
    """What the clients have met."""

    host: str
    port: int
    model: str
    max_tokens: int
    ends_at: float
    answered: int = 0
    left: int = 0
    slow: int = 0
    refused: int = 0
    """Told to come again."""
    errors: Counter[str] = field(default_factory=Counter)


async def client(load: Load, number: int) -> None:
    """One client, until the time is over."""
    chance = random.Random(number)
    while time.monotonic() < load.ends_at:
        try:
            retry_seconds = await asyncio.wait_for(ask(load, chance), 600)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, ValueError) as error:
            load.errors[type(error).__name__] += 1
            retry_seconds = 1.0
        await asyncio.sleep(min(retry_seconds * chance.uniform(0.8, 1.5), max(0.0, load.ends_at - time.monotonic())))


async def ask(load: Load, chance: random.Random) -> float:
    """One request. Returns the seconds to wait before the next."""
    stream, leaves, slow = (chance.random() < share for share in (STREAM_SHARE, LEAVING_SHARE, SLOW_SHARE))
    body = json.dumps(
        {
            "model": load.model,
            "messages": [{"role": "user", "content": chance.choice(PROMPTS)}],
            "max_tokens": chance.randint(1, load.max_tokens),
            "stream": stream,
        }
    ).encode()
    reader, writer = await asyncio.open_connection(load.host, load.port, limit=1 << 20)
    try:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {load.host}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        if leaves and not stream:
            await asyncio.sleep(chance.uniform(0, 2))
            load.left += 1
            return 0.0
        answer = await reader.readuntil(b"\r\n\r\n")
        status = int(answer.split(b" ", 2)[1])
        if status == 429:
            load.refused += 1
            found = re.search(rb"retry-after: (\d+)", answer, re.IGNORECASE)
            if found is None:
                load.errors["429 without Retry-After"] += 1
            return float(found[1]) if found else 1.0
        if status != 200:
            load.errors[f"status {status}"] += 1
            return 1.0
        if leaves:
            await reader.read(chance.randint(1, 2000))
            load.left += 1
            return 0.0
        received = await read_slowly(reader) if slow else await reader.read(-1)
        load.slow += slow
        complete = b"data: [DONE]" in received if stream else b'"finish_reason"' in received
        if complete:
            load.answered += 1
        else:
            load.errors["incomplete answer"] += 1
        return 0.0
    finally:
        writer.close()


async def read_slowly(reader: asyncio.StreamReader) -> bytes:
    """A little at a time."""
    received = b""
    while piece := await reader.read(1000):
        received += piece
        await asyncio.sleep(SLOW_SECONDS)
    return received


async def watch(process: psutil.Process, warm_until: float, ends_at: float) -> list[int]:
    """Resident bytes of the server after the warm-up, once a second."""
    sizes = []
    while time.monotonic() < ends_at:
        await asyncio.sleep(1)
        if time.monotonic() > warm_until:
            sizes.append(process.memory_info().rss)
    return sizes


def figures(load: Load) -> Any:
    """The server's own."""
    with urllib.request.urlopen(f"http://{load.host}:{load.port}/v1/figures", timeout=60) as response:
        return json.load(response)


def start(arguments: list[str]) -> tuple[subprocess.Popen[str], str, int]:
    """A server that is ready, on a port of its own choice."""
    command = [sys.executable, "-m", "offload_sirius", "serve", "--host", "127.0.0.1", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        if found := re.match(r"http://(\S+):(\d+): \S+ is ready", line):
            return process, found[1], int(found[2])
    sys.exit("the server has not started")


async def run(load: Load, process: psutil.Process, num_clients: int, warm_until: float) -> list[int]:
    """All clients and the watch."""
    clients = [asyncio.ensure_future(client(load, number)) for number in range(num_clients)]
    sizes = await watch(process, warm_until, load.ends_at)
    # Who still waits for an answer leaves.
    for each in clients:
        each.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return sizes


def free_at_the_end(load: Load) -> bool:
    """Whether every slot is free, and nobody waits, soon after the clients have gone."""
    for _ in range(100):
        found = figures(load)
        if found["active"] == 0 and found["queue"] == 0:
            return True
        time.sleep(0.1)
    return False


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--warm-up", type=float, default=60, help="seconds after which memory is watched")
    parser.add_argument("--max-tokens", type=int, default=24, help="of the longest answers")
    parser.add_argument("server", nargs="*", help="flags of offload-sirius serve, behind --")
    given = parser.parse_args()
    process, host, port = start(given.server)
    try:
        began = time.monotonic()
        model = json.load(urllib.request.urlopen(f"http://{host}:{port}/v1/models"))["data"][0]["id"]
        load = Load(host=host, port=port, model=model, max_tokens=given.max_tokens, ends_at=began + given.seconds)
        sizes = asyncio.run(run(load, psutil.Process(process.pid), given.clients, began + given.warm_up))
        is_free, found = free_at_the_end(load), figures(load)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    ratio = max(sizes) / min(sizes)
    print(
        f"{given.clients} clients, {given.seconds:.0f} s: {load.answered} answered ({load.slow} read slowly), {load.left} left,"
    )
    print(f"{load.refused} told to come again; {found['tokens']['generated']} tokens; answers by end: {found['answers']}")
    print(f"errors: {dict(load.errors) or 'none'}")
    print(f"resident after {given.warm_up:.0f} s: {min(sizes) / 1e6:.0f} to {max(sizes) / 1e6:.0f} MB, ratio {ratio:.3f}")
    print(f"slots and queue at the end: {'free' if is_free else 'not free'}; exit status of the server: {code}")
    held = not load.errors and ratio <= MOST_MEMORY_RATIO and is_free and code == 0 and load.answered > 0
    print(
        json.dumps({"held": held, "answered": load.answered, "left": load.left, "refused": load.refused, "memory_ratio": ratio})
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())

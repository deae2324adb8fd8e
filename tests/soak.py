"""Minutes of good, hostile and disconnecting clients at the same time, against a server in a process of its own.

    make soak MINUTES=5

Good answers must equal those of the same weights offline. Every hostile request must get its error, almost always
within a second. The memory of the server must not grow after the first fifth of the time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import openai
import psutil
from conftest import picture
from hostile import BAD
from serving import PATH, png, request

from convllava import load
from convllava.checkpoints import SHIPPED

TEXTS = ("What is the total?", "Describe the image.", "Where is the word?", "What color is the circle?")
OPTIONS = {
    "--context": 512,
    "--max-images": 2,
    "--max-megapixels": 0.2,
    "--max-new-tokens": 450,
    "--cache-mb": 1,
    "--max-queue": 40,
}
NOT_BAD = ("many answers", "many pixels")
"""Requests that the limits of this server and model allow."""
MOST_GROWTH_MB = 64
MOST_SECONDS = 1.0
MOST_LATE = 0.02
"""Share of the errors that may take longer, because the machine may be busy."""


class Soak:
    """State shared by all clients: address of the server, right answers, and results."""

    def __init__(self, url: str, answers: dict[tuple[int, str], str], end: float) -> None:
        self.url, self.answers, self.end = url, answers, end
        self.counts: Counter[str] = Counter()
        self.rejection_seconds: list[float] = []
        self.faults: list[str] = []

    def good(self, seed: int) -> None:
        """Ask questions with known answers, streamed or not."""
        dice = random.Random(seed)
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=20)
        while time.monotonic() < self.end:
            (number, text), expected = dice.choice(list(self.answers.items()))
            found = _answer(client, request(text, png(numbered(number)), max_tokens=24), dice.random() < 0.5)
            self.counts["good"] += 1
            if found != expected:
                self.faults.append(f"image {number}, {text}: {found!r} instead of {expected!r}")

    def hostile(self, seed: int) -> None:
        """Send requests that must be rejected at once."""
        dice = random.Random(seed)
        names = [name for name in BAD if name not in NOT_BAD]
        while time.monotonic() < self.end:
            name = dice.choice(names)
            content, status, _, _ = BAD[name]
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            started, found = time.monotonic(), self._status(body)
            self.rejection_seconds.append(time.monotonic() - started)
            self.counts["hostile"] += 1
            if found not in (status, 429):
                self.faults.append(f"{name}: {found} instead of {status}")
            time.sleep(dice.random() / 10)

    def disconnecting(self, seed: int) -> None:
        """Disconnect before, during or after the body, or in the middle of the answer."""
        dice = random.Random(seed)
        while time.monotonic() < self.end:
            image = png(picture(64, 64 * dice.randint(1, 4), dice.randint(0, 10_000)))
            body = json.dumps(request("?", image, max_tokens=200, temperature=2, stream=dice.random() < 0.5)).encode()
            with suppress(OSError), self._connect() as connection:
                connection.sendall(_head(len(body)) + body[: dice.choice([0, len(body) // 2, len(body)])])
                time.sleep(dice.random() / 2)
                connection.setblocking(False)
                connection.recv(dice.randint(1, 2000))
            self.counts["disconnected"] += 1

    def _connect(self) -> socket.socket:
        parts = urlsplit(self.url)
        return socket.create_connection((parts.hostname, parts.port), timeout=60)

    def _status(self, body: bytes) -> int | str:
        """Return the status, or the error of a connection that was closed without an answer, which is a fault too."""
        try:
            with self._connect() as connection:
                connection.sendall(_head(len(body)) + body)
                return int(connection.recv(100).split()[1])
        except (OSError, IndexError, ValueError) as error:
            return repr(error)


def _answer(client: openai.OpenAI, asked: dict, stream: bool) -> str | None:
    try:
        if not stream:
            return client.chat.completions.create(**asked).choices[0].message.content
        pieces = client.chat.completions.create(**asked, stream=True)
        return "".join(piece.choices[0].delta.content or "" for piece in pieces)
    except openai.OpenAIError as error:
        return f"({error})"


def _head(length: int) -> bytes:
    lines = (f"POST {PATH} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def numbered(number: int):
    return picture(64 * (1 + number % 2), 64 * (1 + number % 3), number)


def offline_answers() -> dict[tuple[int, str], str]:
    """Return the right answers by image and question."""
    assistant = load("tiny")
    keys = [(number, text) for number in range(12) for text in TEXTS]
    return {(number, text): str(assistant.ask(numbered(number), text, max_new_tokens=24)) for number, text in keys}


def megabytes(pid: int) -> float:
    return psutil.Process(pid).memory_info().rss / 2**20


def start(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """A server by the name that the requests use, and its address."""
    model = folder / "test"
    model.symlink_to(SHIPPED / "tiny")
    options = [str(part) for pair in OPTIONS.items() for part in pair]
    command = [sys.executable, "-m", "convllava", "serve", "--model", str(model), "--port", "0", *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    line = next(line for line in server.stderr if line.startswith("serving"))
    threading.Thread(target=lambda: sys.stderr.writelines(server.stderr or ()), daemon=True).start()
    return server, line.split()[-1].removesuffix("/v1")


def attack(soak: Soak, pid: int, seconds: float) -> list[float]:
    """Run all clients until the end; return the server's memory, sampled from the first fifth of the time on."""
    clients = [soak.good] * 4 + [soak.hostile] * 2 + [soak.disconnecting] * 3
    threads = [threading.Thread(target=client, args=(seed,)) for seed, client in enumerate(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 5)
    memory = [megabytes(pid)]
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        memory.append(megabytes(pid))
    return memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    seconds = 60 * parser.parse_args().minutes
    answers = offline_answers()
    with tempfile.TemporaryDirectory() as folder:
        server, url = start(Path(folder))
        soak = Soak(url, answers, time.monotonic() + seconds)
        memory = attack(soak, server.pid, seconds)
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    # Compare the maxima of both halves, because memory goes up and down with the images being decoded.
    growth = max(memory[len(memory) // 2 :]) - max(memory[: len(memory) // 2])
    late = sum(taken > MOST_SECONDS for taken in soak.rejection_seconds)
    report = {
        **soak.counts,
        "wrong": len(soak.faults),
        "errors_later_than_a_second": late,
        "slowest_error": round(max(soak.rejection_seconds), 3),
        "memory_mb": round(max(memory), 1),
        "growth_mb": round(growth, 1),
        "exit_code": code,
    }
    print(*soak.faults[:20], json.dumps(report), sep="\n")
    is_late = late > MOST_LATE * len(soak.rejection_seconds)
    return int(bool(soak.faults) or growth > MOST_GROWTH_MB or is_late or code != 0)


if __name__ == "__main__":
    sys.exit(main())

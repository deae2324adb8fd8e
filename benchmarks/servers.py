"""Servers of one model in processes of their own: ours, transformers' and vLLM's, with equal threads."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import torch

from convllava.errors import InputError

SLOTS = 8
"""Answers that are written at once."""
_STARTING_SECONDS = 600
"""vLLM compiles the model first."""
_ENDING_SECONDS = 30.0


@dataclass(frozen=True)
class Server:
    """How one is started.

    Attributes:
        command: With its arguments.
        port: Where it will listen.
        model: By which name it knows its model.
        environment: Beside that of this process.
        asked: What a request must say besides, for an answer to be as long as it may be.
    """

    command: list[str]
    port: int
    model: str
    environment: Mapping[str, str] = field(default_factory=dict)
    asked: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Running:
    """A server: its address, the name of its model, its process, and `Server.asked`."""

    url: str
    model: str
    pid: int
    asked: Mapping[str, bool] = field(default_factory=dict)

    def cpu_seconds(self) -> float:
        """Of the process and those that it has started, so far (man 5 proc; counted in hundredths)."""
        return sum(map(_cpu_seconds, _family(self.pid)))


def ours(folder: Path) -> Server:
    """`convllava serve` of a model's folder."""
    port = _free_port()
    options = ["--port", str(port), "--slots", str(SLOTS), "--threads", str(torch.get_num_threads())]
    return Server([sys.executable, "-m", "convllava", "serve", "--model", str(folder), *options], port, folder.name)


def stock(folder: Path) -> Server:
    """`transformers serve`.

    Raises:
        InputError: something that it imports is not here.
    """
    if find_spec("requests") is None or find_spec("openai") is None:
        raise InputError("--peers needs transformers serve; pip install 'transformers[serving]' requests")
    port = _free_port()
    options = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    return Server([sys.executable, "-m", "benchmarks.stock_server", *options], port, str(folder))


def vllm(folder: Path, python: Path) -> Server:
    """What `vllm serve` starts.

    Args:
        python: Of an environment that has vLLM for CPUs and convllava.

    Raises:
        InputError: there is no such program.
    """
    if python.is_dir() or not os.access(python, os.X_OK):
        raise InputError(f"--vllm {python} is no program; give the python of an environment that has vLLM")
    port = _free_port()
    options = ["--model", str(folder), *f"--served-model-name model --host 127.0.0.1 --port {port}".split()]
    options += f"--dtype float32 --max-num-seqs {SLOTS} --max-model-len 2048".split()
    # By itself it would take all processors but one, whatever the others may.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [str(python), "-m", "vllm.entrypoints.launchers.api_server.entry", *options]
    return Server(command, port, "model", environment, {"ignore_eos": True})


@contextmanager
def started(server: Server) -> Iterator[Running]:
    """A server in a process of its own, with as many threads of one operation as here.

    Raises:
        InputError: it does not start; with the end of what it said.
    """
    equal = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment = {**os.environ, **equal, **server.environment}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(server.command, stdout=log, stderr=log, env=environment) as process,
    ):
        try:
            _await(process, server.port, log)
            yield Running(f"127.0.0.1:{server.port}", server.model, process.pid, server.asked)
        finally:
            _end(process)


def _await(process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    deadline = time.monotonic() + _STARTING_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    process.kill()
    log.seek(0)
    raise InputError(f"the server does not start: {log.read()[-300:].decode(errors='replace')}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _family(pid: int) -> Iterator[int]:
    yield pid
    with suppress(FileNotFoundError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in _read(task / "children").split():
                yield from _family(int(child))


def _cpu_seconds(pid: int) -> float:
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _read(path: Path) -> str:
    """What the system says of a process or thread; nothing of one that has ended meanwhile."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""

"""Servers of one model, each in its own process and with equal threads: ours, transformers' and vLLM's."""

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

import psutil
import torch

from convllava.errors import InputError

SLOTS = 8
"""Answers that a server writes at the same time."""
START_SECONDS = 600.0
"""Time limit for the start; vLLM compiles the model first."""
STOP_SECONDS = 30.0
"""Time between SIGTERM and SIGKILL."""


@dataclass(frozen=True)
class Server:
    """How to start a server.

    Attributes:
        command: The program and its arguments.
        port: Port on 127.0.0.1.
        model: The model's name in requests.
        environment: Additional environment variables.
        request: Additional fields of a request, so that answers do not end early.
    """

    command: list[str]
    port: int
    model: str
    environment: Mapping[str, str] = field(default_factory=dict)
    request: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class RunningServer:
    """A started server: host and port, the model's name, the process id, and `Server.request`."""

    url: str
    model: str
    pid: int
    request: Mapping[str, bool] = field(default_factory=dict)

    def cpu_seconds(self) -> float:
        """Return the CPU time so far of the process and all its descendants that still run."""
        seconds = 0.0
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):  # it has ended in the meantime
                    times = one.cpu_times()
                    seconds += times.user + times.system
        return seconds


def convllava_serve(folder: Path) -> Server:
    """Return `convllava serve` for a model's folder."""
    port = free_port()
    options = ["--port", str(port), "--slots", str(SLOTS), "--threads", str(torch.get_num_threads())]
    return Server([sys.executable, "-m", "convllava", "serve", "--model", str(folder), *options], port, folder.name)


def transformers_serve(folder: Path) -> Server:
    """Return `transformers serve`.

    Raises:
        InputError: if a package that it needs is missing.
    """
    if find_spec("requests") is None or find_spec("openai") is None:
        raise InputError("`peers` starts transformers serve; pip install 'transformers[serving]' requests")
    port = free_port()
    options = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    return Server([sys.executable, "-m", "benchmarks.transformers_server", *options], port, str(folder))


def vllm_serve(folder: Path, python: Path) -> Server:
    """Return vLLM's OpenAI server.

    Args:
        folder: The model's folder.
        python: The Python executable of an environment that has vLLM for CPUs and convllava.

    Raises:
        InputError: if `python` is not an executable file.
    """
    if python.is_dir() or not os.access(python, os.X_OK):
        raise InputError(f"`vllm` {python} is not a program; give the python of an environment that has vLLM")
    port = free_port()
    options = ["--model", str(folder), *f"--served-model-name model --host 127.0.0.1 --port {port}".split()]
    options += f"--dtype float32 --max-num-seqs {SLOTS} --max-model-len 2048".split()
    # Without "nobind" vLLM would use all processors except one.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [str(python), "-m", "vllm.entrypoints.launchers.api_server.entry", *options]
    return Server(command, port, "model", environment, {"ignore_eos": True})


@contextmanager
def started(server: Server) -> Iterator[RunningServer]:
    """Start a server with as many threads per operation as this process has, and stop it at the end of the block.

    Raises:
        InputError: if it does not start; the message has the end of its output.
    """
    equal = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment = {**os.environ, **equal, **server.environment}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(server.command, stdout=log, stderr=log, env=environment) as process,
    ):
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _accepts(server.port):
                if time.monotonic() > deadline or process.poll() is not None:
                    process.kill()
                    log.seek(0)
                    raise InputError(f"the server does not start: {log.read()[-300:].decode(errors='replace')}")
                time.sleep(0.2)
            yield RunningServer(f"127.0.0.1:{server.port}", server.model, process.pid, server.request)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

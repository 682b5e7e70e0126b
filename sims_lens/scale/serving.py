"""Having a checkpoint served by a vLLM in a process, perhaps an environment, of its own, while it is needed."""

import logging
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from sims_lens.errors import SamplerError

logger = logging.getLogger("sims_lens")

_QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
"""A served model is nobody else's business."""


@runtime_checkable
class Serve(Protocol):
    """Serves a checkpoint while a ``with`` block lasts. Where the server is elsewhere, write one of your own.

    Examples:
        On another machine, by a script of yours::

            @contextmanager
            def serve(checkpoint: Path, dtype: str) -> Iterator[str]:
                subprocess.run(["my-serve", str(checkpoint), checkpoint.name, dtype], check=True)
                yield "https://gpu.example.org/v1"
    """

    def __call__(self, checkpoint: Path, dtype: str) -> AbstractContextManager[str]:
        """Give the base URL of an OpenAI-compatible server that knows the checkpoint by the name of its folder.

        Args:
            checkpoint: a Hugging Face checkpoint with its tokenizer.
            dtype: to run it in, such as "bfloat16".
        """
        ...


@dataclass(frozen=True)
class VLLMServer:
    """Starts vLLM on this machine for a checkpoint, on a free port of the loopback address.

    It is started anew for each plan, which takes it some tens of seconds. vLLM pins its own torch, so that it's best
    installed into an environment of its own; only its command is needed here.

    Args:
        command: that the checkpoint's folder is added to: ``("vllm", "serve")``, or
            ``("/opt/vllm/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model")``.
        options: more of its options, as ``("--tensor-parallel-size", "4")``.
        patience: seconds until it must answer.
    """

    command: tuple[str, ...] = ("vllm", "serve")
    options: tuple[str, ...] = ()
    patience: int | float = 1800

    @contextmanager
    def __call__(self, checkpoint: Path, dtype: str) -> Iterator[str]:
        """See :class:`Serve`.

        Raises:
            SamplerError: it couldn't be started, ended, or didn't answer in time; with what it said last.
        """
        port = _free_port()
        arguments = [
            *self.command,
            str(checkpoint),
            *("--served-model-name", checkpoint.name, "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype),
            # What is drawn is what the request says, not what a file beside the weights does; and what is cached is
            # told, so that it is not counted as computed.
            *("--generation-config", "vllm", "--enable-prompt-tokens-details"),
            *self.options,
        ]
        with tempfile.TemporaryFile() as log:
            try:
                process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | _QUIET,
                )
            except OSError as error:
                raise SamplerError(
                    f"{self.command[0]!r} can't be started ({error.strerror}); install vLLM (pip install "
                    "'sims-lens[vllm]', or into an environment of its own) and say where it is: "
                    'VLLMServer(command=("/opt/vllm/bin/vllm", "serve"))'
                ) from error
            try:
                logger.info("vLLM is starting with %s on port %d", checkpoint.name, port)
                self._wait(process, port, log.fileno())
                yield f"http://127.0.0.1:{port}/v1"
            finally:
                process.terminate()  # it ends its own workers
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _wait(self, process: "subprocess.Popen[bytes]", port: int, log: int) -> None:
        opener, until = build_opener(ProxyHandler({})), time.monotonic() + self.patience
        while time.monotonic() < until:
            if process.poll() is not None:
                raise SamplerError(f"vLLM ended with code {process.returncode} before it served: {_last_words(log)}")
            with (
                suppress(URLError, OSError),
                opener.open(f"http://127.0.0.1:{port}/health", timeout=5),
            ):
                return
            time.sleep(0.2)
        raise SamplerError(f"vLLM didn't answer within {self.patience:g} s; its last words: {_last_words(log)}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_words(log: int) -> str:
    """The end of what a process wrote, on one line."""
    size = os.fstat(log).st_size
    text = os.pread(log, 2000, max(0, size - 2000)).decode("utf-8", "replace")
    return " ".join(text.split())[-400:] or "(nothing)"


__all__ = ["Serve", "VLLMServer"]

"""A process that ends with its parent, even when SIGKILL ends the parent.

A supervisor stands between the two: this file, run as a script. It starts the process and holds
the read end of a pipe from the parent. The pipe closes when the parent ends, in any way. Then the
supervisor ends the process.

``PR_SET_PDEATHSIG`` alone is not enough: it fires when the *thread* that forked ends, and macOS
does not have it. Here it only covers the supervisor's own death. Signals travel through the pipe,
one byte each. So a signal cannot reach another process that got the id of an ended one.

Supervisor and process have their own session: Ctrl-C in the terminal does not reach them.

The script runs with ``-I -S`` for a quick start. So this module imports only the standard library.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

PARENT_CHECK_SECONDS = 1.0
"""Interval of the check of the parent's id. Another process may have inherited the pipe, and
then the pipe stays open after the parent's end."""

LOCK_WAIT_SECONDS = 3.0
"""Time for the children of a killed process to end, such as a Redis that rewrites its file."""

_PR_SET_PDEATHSIG = 1
_CANNOT_START = 127


class SupervisedProcess:
    """A running process that does not outlive this one.

    Args:
        command: path of the program, and its arguments.
        log_path: file to which standard output and error are appended. It stays locked while the
            process or one of its children has it open. So no other run can use its directory.
        directory: working directory.
        environment: all its environment variables. None: those of this process.
        remove: directory to delete when the parent's end ends the process. The process is then
            killed at once.
        grace_seconds: time to stop after the parent's end.

    Raises:
        ChildProcessError: the program cannot be started, or another run has the log.
    """

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        log_path: Path,
        directory: Path,
        environment: Mapping[str, str] | None = None,
        remove: Path | None = None,
        grace_seconds: float = 10.0,
    ) -> None:
        arguments = [str(os.getpid()), str(remove or ""), str(grace_seconds)]
        with log_path.open("ab") as log:
            _lock(log)
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, *arguments, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                cwd=directory,
                env=environment,
                start_new_session=True,
            )
        assert self._supervisor.stdout is not None
        with self._supervisor.stdout as report:
            first_line = report.readline().decode(errors="replace").strip()
        if not first_line.isdigit():
            self.wait()
            raise ChildProcessError(first_line or "its supervisor did not start")
        self.pid = int(first_line)

    @property
    def supervisor_pid(self) -> int:
        """Id of the supervisor's process."""
        return self._supervisor.pid

    def poll(self) -> int | None:
        """Exit status, or 128 + n if signal n ended the process; None while it runs."""
        status = self._supervisor.poll()
        if status is not None:
            self._close_pipe()
        return status

    def wait(self, timeout_seconds: float | None = None) -> int:
        """Wait for the end and return the exit status as :meth:`poll` does.

        Raises:
            TimeoutError: the process still runs after ``timeout_seconds``.
        """
        try:
            status = self._supervisor.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"process {self.pid} still runs") from None
        self._close_pipe()
        return status

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process; do nothing if it has ended."""
        if self.poll() is None:
            assert self._supervisor.stdin is not None
            try:
                self._supervisor.stdin.write(bytes([number]))
            except BrokenPipeError:
                return  # it ended just now

    def stop(self, timeout_seconds: float) -> int:
        """Send SIGCONT and SIGTERM, then SIGKILL after the limit, and return the exit status."""
        self.send_signal(signal.SIGCONT)
        self.send_signal(signal.SIGTERM)
        try:
            return self.wait(timeout_seconds)
        except TimeoutError:
            return self.kill()

    def kill(self) -> int:
        """Send SIGKILL and return the exit status."""
        self.send_signal(signal.SIGKILL)
        return self.wait()

    def __enter__(self) -> SupervisedProcess:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def _close_pipe(self) -> None:
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.close()


def _lock(log: BinaryIO) -> None:
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        try:
            return fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ChildProcessError(
                    f"{log.name} belongs to a process that still runs: end it, or use another"
                    " directory"
                ) from None
        time.sleep(0.05)


def supervise(parent_pid: int, remove: str, grace_seconds: float, command: Sequence[str]) -> int:
    """Run ``command`` until it or the parent ends, and return its exit status."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None

    def die_with_supervisor() -> None:
        if library is not None:
            library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            preexec_fn=die_with_supervisor,  # safe: this process still has one thread
        )
    except OSError as error:
        os.write(1, f"{error}\n".encode())
        return _CANNOT_START
    signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    orphaned = threading.Event()
    threading.Thread(
        target=_forward_signals,
        args=(process, parent_pid, 0.0 if remove else grace_seconds, orphaned),
        daemon=True,
    ).start()
    os.write(1, f"{process.pid}\n".encode())
    status = process.wait()
    if remove and orphaned.is_set():
        shutil.rmtree(remove, ignore_errors=True)  # another supervisor may be removing it too
    return status if status >= 0 else 128 - status


def _forward_signals(
    process: subprocess.Popen[bytes],
    parent_pid: int,
    grace_seconds: float,
    orphaned: threading.Event,
) -> None:
    """Forward each signal from the pipe; end the process when the parent has ended."""
    while True:
        readable, _, _ = select.select([0], [], [], PARENT_CHECK_SECONDS)
        if readable:
            received = os.read(0, 1)
            if not received:
                break
            process.send_signal(received[0])
        elif os.getppid() != parent_pid:
            break
    orphaned.set()
    if grace_seconds:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        time.sleep(grace_seconds)  # the main thread exits before, if the child ends in time
    process.kill()


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4:]))

"""A process that ends with its parent, even when the parent is killed with SIGKILL.

Between the two stands a supervisor: this file, run as a script. It starts the process, holds the
read end of a pipe from the parent, and ends the process as soon as the pipe closes, however the
parent went. (``PR_SET_PDEATHSIG`` alone would fire when the *thread* that forked ends, and macOS
has none; here it only covers the supervisor's own death.) Signals travel through the same pipe,
one byte each, so that none can reach a stranger who got the number of a process already gone.

Supervisor and process have a session of their own: Ctrl-C in the terminal does not reach them.

The script runs with ``-I -S`` for a quick start, so this module imports the standard library only.
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
"""A pipe that something else inherited stays open: the parent's number is looked at this often."""

LOCK_WAIT_SECONDS = 3.0
"""A killed process's children, such as a Redis that rewrites its file, may need a moment to end."""

_PR_SET_PDEATHSIG = 1
_CANNOT_START = 127


class SupervisedProcess:
    """A running process that does not outlive this one.

    Args:
        command: the program's path and its arguments.
        log_path: file that standard output and error are appended to. It stays locked while the
            process or one of its children has it open, so that no other run can use the
            directory that it lies in.
        directory: working directory.
        environment: all its environment variables; ours when None.
        remove: directory that is deleted when the process ends because its parent did;
            the process is then killed at once instead of told to stop.
        grace_seconds: how long it may take to stop when its parent ended.

    Raises:
        ChildProcessError: the program could not be started, or another run has the log; the
            message says which.
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
        terms = [str(os.getpid()), str(remove or ""), str(grace_seconds)]
        with log_path.open("ab") as log:
            _lock(log)
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, *terms, *command],
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
        """Number of the process in between."""
        return self._supervisor.pid

    def poll(self) -> int | None:
        """Exit status, 128 + n when signal n ended it, or None while it runs."""
        status = self._supervisor.poll()
        if status is not None:
            self._close_pipe()
        return status

    def wait(self, timeout_seconds: float | None = None) -> int:
        """Wait for its end and return the exit status as :meth:`poll` does.

        Raises:
            TimeoutError: it still runs after ``timeout_seconds``.
        """
        try:
            status = self._supervisor.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"process {self.pid} still runs") from None
        self._close_pipe()
        return status

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process; nothing happens when it has ended."""
        if self.poll() is None:
            assert self._supervisor.stdin is not None
            try:
                self._supervisor.stdin.write(bytes([number]))
            except BrokenPipeError:
                return  # it ended just now

    def stop(self, timeout_seconds: float) -> int:
        """SIGTERM (after SIGCONT), then SIGKILL if it has not ended in time; the exit status."""
        self.send_signal(signal.SIGCONT)
        self.send_signal(signal.SIGTERM)
        try:
            return self.wait(timeout_seconds)
        except TimeoutError:
            return self.kill()

    def kill(self) -> int:
        """SIGKILL; returns the exit status."""
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
                    f"{log.name} belongs to a process that still runs; end it, or use another"
                    " directory"
                ) from None
        time.sleep(0.05)


def supervise(parent_pid: int, remove: str, grace_seconds: float, command: Sequence[str]) -> int:
    """The supervisor: run ``command`` until it ends or the parent does; returns its status."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None

    def die_with_supervisor() -> None:
        if library is not None:
            library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            preexec_fn=die_with_supervisor,  # safe: this process has one thread yet
        )
    except OSError as error:
        os.write(1, f"{error}\n".encode())
        return _CANNOT_START
    signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    orphaned = threading.Event()
    threading.Thread(
        target=_obey,
        args=(process, parent_pid, 0.0 if remove else grace_seconds, orphaned),
        daemon=True,
    ).start()
    os.write(1, f"{process.pid}\n".encode())
    status = process.wait()
    if remove and orphaned.is_set():
        shutil.rmtree(remove, ignore_errors=True)  # a neighbour may be removing it as well
    return status if status >= 0 else 128 - status


def _obey(
    process: subprocess.Popen[bytes],
    parent_pid: int,
    grace_seconds: float,
    orphaned: threading.Event,
) -> None:
    """Pass on each signal from the pipe; end the process when the parent is gone."""
    while True:
        readable, _, _ = select.select([0], [], [], PARENT_CHECK_SECONDS)
        if readable:
            order = os.read(0, 1)
            if not order:
                break
            process.send_signal(order[0])
        elif os.getppid() != parent_pid:
            break
    orphaned.set()
    if grace_seconds:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        time.sleep(grace_seconds)  # the main thread ends this process as soon as the child has
    process.kill()


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4:]))

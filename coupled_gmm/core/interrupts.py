"""How a command ends when it is told to stop, by Ctrl-C or SIGTERM: one line, a status, nothing half written.

Python's own way, a KeyboardInterrupt in the main thread, waits until compiled code returns, which takes a long fit minutes, and
then takes the interpreter down under XLA's threads, which may crash. Here a thread of its own waits for the signal, and leaves.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

_LINES = {signal.SIGINT: "interrupted", signal.SIGTERM: "interrupted by SIGTERM"}
_DUMB = ("", "dumb", "unknown")  # terminals without escape sequences
# Held while something must not be cut in two; whoever leaves takes it for good, so that nobody else goes on.
lock = threading.Lock()
_undo: list[Callable[[], None]] = []


def line(number: int = signal.SIGINT) -> str:
    """What is said of a signal."""
    return _LINES[signal.Signals(number)]


def is_command() -> bool:
    """Whether this process is the command line: ``coupled-gmm`` or ``python -m coupled_gmm.cli``."""
    # While Python looks for the module to run, and imports packages on its way, the first argument is "-m".
    return Path(*sys.argv[:1]).stem == "coupled-gmm" or (sys.argv[:1] == ["-m"] and "coupled_gmm.cli" in sys.orig_argv)


def watch() -> None:
    """From now on, once is enough, signals end the process; those that whoever started it has it ignore stay ignored."""
    caught = [n for n in _LINES if signal.getsignal(n) not in (signal.SIG_IGN, _leave_it_to_the_thread)]
    if not caught or threading.current_thread() is not threading.main_thread():
        return
    if "--multiprocessing-fork" in sys.orig_argv:  # a worker: Ctrl-C reaches it too, and it ends with the command
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    import socket  # for commands only; it takes as long as the rest of this file

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in caught:
        signal.signal(number, _leave_it_to_the_thread)
    # The thread keeps the writing end too: closed, it would be no descriptor to wake up by.
    threading.Thread(target=_wait, args=(reader, writer), name="interrupts", daemon=True).start()


def ignore() -> None:
    """From now on, the work being done: a process that ends by itself is not said to have been interrupted."""
    lock.acquire()


@contextlib.contextmanager
def undoing(undo: Callable[[], None]) -> Iterator[None]:
    """`undo` is called when the block ends, in whichever way, and when a signal ends the process meanwhile."""
    _undo.append(undo)
    try:
        yield
    finally:
        with lock:
            _undo.remove(undo)
            undo()


def _leave_it_to_the_thread(number: int, frame: object) -> None:
    pass


def _wait(reader: "socket.socket", writer: "socket.socket") -> None:
    number = reader.recv(1)[0]
    lock.acquire()
    for undo in reversed(_undo):
        undo()
    with contextlib.suppress(OSError, ValueError):
        if os.isatty(1) and os.environ.get("TERM", "") not in _DUMB:
            os.write(1, b"\r\x1b[2K\x1b[?25h")  # the bar's line goes, the cursor that it hid comes back
    with contextlib.suppress(OSError):
        os.write(2, f"{line(number)}\n".encode())
    os._exit(128 + number)

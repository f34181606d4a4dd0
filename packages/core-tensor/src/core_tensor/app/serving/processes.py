"""Worker processes that share one port."""

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from core_tensor.app.extras import require
from core_tensor.app.serving.bodies import EXTRA
from core_tensor.app.serving.service import SHARED_METRICS

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

    from fastapi import FastAPI

_LOGGER = logging.getLogger(__name__)


def serve(
    build: "Callable[[], FastAPI]",
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    workers: int = 1,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; running requests are then finished. A worker that dies is replaced.

    Args:
        build: Makes the application, once in every worker; with several workers it must pickle.
        host: Address to listen on; the default takes connections of this machine only.
        port: Port to listen on; 0 for any free one.
        workers: Processes that share the port.
        started: Called with the address, such as `http://127.0.0.1:8080`, once the port is taken.

    Raises:
        OSError: If the port is taken.
        RuntimeError: If a worker cannot start.
        MissingExtraError: If the extra is not installed.
    """
    require("uvicorn", EXTRA)
    listener = socket.create_server((host, port), backlog=2048)
    try:
        if started is not None:
            started(f"http://{host}:{listener.getsockname()[1]}")
        if workers == 1:
            _work(build, listener)
        else:
            _supervise(build, listener, workers)
    finally:
        listener.close()


def _work(build: "Callable[[], FastAPI]", listener: socket.socket, built: "Event | None" = None) -> None:
    """One worker; it says when it has built its application."""
    uvicorn = require("uvicorn", EXTRA)
    options = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 30}
    application = build()
    if built is not None:
        built.set()
    with _on_signals(lambda: None):  # uvicorn repeats the signal when it has finished; that is the end
        uvicorn.Server(uvicorn.Config(application, **options)).run(sockets=[listener])


@contextlib.contextmanager
def _on_signals(action: Callable[[], object]) -> Iterator[None]:
    """Do this on SIGINT and SIGTERM, in place of ending; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: action()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _supervise(build: "Callable[[], FastAPI]", listener: socket.socket, workers: int) -> None:
    """Keep several workers on one port."""
    context = multiprocessing.get_context("spawn")
    stop = threading.Event()
    with tempfile.TemporaryDirectory(prefix="metrics-") as folder, _on_signals(stop.set):
        os.environ[SHARED_METRICS] = folder  # before a worker imports prometheus_client
        running: dict[Any, Event] = {}
        try:
            while not stop.is_set():
                for process in [process for process in running if not process.is_alive()]:
                    built = running.pop(process)
                    if process.exitcode > 0 and not built.is_set():  # another would fail likewise
                        raise RuntimeError("a worker cannot start; its error is above")
                    _LOGGER.error("worker %d ended (%s); another takes its place", process.pid, process.exitcode)
                while len(running) < workers:
                    built = context.Event()
                    process = context.Process(target=_work, args=(build, listener, built))
                    process.start()
                    running[process] = built
                multiprocessing.connection.wait([process.sentinel for process in running], timeout=0.5)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.join()
            os.environ.pop(SHARED_METRICS)

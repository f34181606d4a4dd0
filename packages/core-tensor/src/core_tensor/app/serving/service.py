"""The application of one worker: queue, limits, pool and metrics."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core_tensor.app.extras import require
from core_tensor.app.serving.bodies import (
    ARROW,
    EXTRA,
    RefusalError,
    arrow_response,
    json_response,
    parse_arrow,
    parse_json,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from fastapi import FastAPI, Request, Response

SHARED_METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""Variable that says where several workers add up their metrics; the name is prometheus_client's."""
_UNSAID = "application/x-www-form-urlencoded"
"""What `curl -d` and urllib say of a body whose type nobody named; it is read as JSON."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one service accepts; a request beyond it is refused before any work.

    Attributes:
        body_bytes: Size of a request's body.
        rows: Rows of a request.
        body_seconds: Time that a client may take to send its body.
        answer_seconds: Time from a complete body to the answer.
        waiting: Requests running or queued per worker; more get 503 at once, so that a load balancer goes elsewhere.
        threads: Requests computed at the same time per worker.
    """

    body_bytes: int = 8 << 20
    rows: int = 10_000
    body_seconds: float = 10.0
    answer_seconds: float = 10.0
    waiting: int = 64
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse limits that would accept nothing."""
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")


@dataclass(frozen=True)
class Endpoint:
    """One function that is served.

    Attributes:
        path: Where, such as `"/score"`.
        compute: `(rows, options) -> columns`, each a list or array with one entry per row or of any other length.
            ValueError and TypeError mean bad rows, and their message is the client's answer.
        schema: Columns that rows may have and their types; values of JSON are converted to them, other columns are
            refused, absent ones are null. None takes rows as they come.
        description: What it computes, for `/openapi.json`.
    """

    path: str
    compute: "Callable[[pa.Table, dict[str, Any]], Mapping[str, Any]]"
    schema: "pa.Schema | None" = None
    description: str = ""


def application(
    name: str,
    endpoints: Sequence[Endpoint],
    *,
    limits: Limits | None = None,
    information: Callable[[], Mapping[str, Any]] = dict,
) -> "FastAPI":
    """Build the service.

    Args:
        name: Name of the distribution, which prefixes the metrics.
        endpoints: What is served.
        limits: What is accepted; None for the defaults.
        information: Further fields of `/health`, such as the version of the model, asked at every call.

    Returns:
        An ASGI application, for `serve`, or for any other server.

    Raises:
        MissingExtraError: If the extra is not installed.
    """
    fastapi = require("fastapi", EXTRA)
    service = _Service(name, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(app: "FastAPI") -> Any:
        del app
        yield
        service.close()

    app: FastAPI = fastapi.FastAPI(title=name, docs_url=None, redoc_url=None, lifespan=lifespan)

    async def health() -> "Response":
        return json_response(200, {"status": "ok", "name": name, **information()})

    async def metrics() -> "Response":
        return service.metrics()

    app.add_api_route("/health", health, methods=["GET"], summary="What is served")
    app.add_api_route("/metrics", metrics, methods=["GET"], summary="Figures for Prometheus")
    for endpoint in endpoints:
        app.add_api_route(
            endpoint.path,
            service.handler(endpoint),
            methods=["POST"],
            summary=endpoint.description,
            openapi_extra={"requestBody": {"content": {"application/json": {}, ARROW: {}}, "required": True}},
        )
    return app


@dataclass
class _Service:
    """The state of one worker: its pool, its queue, its metrics."""

    name: str
    limits: Limits
    waiting: int = 0
    pool: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        prometheus = require("prometheus_client", EXTRA)
        self.pool = ThreadPoolExecutor(self.limits.threads, thread_name_prefix=self.name)
        self.registry = prometheus.CollectorRegistry()
        prefix = self.name.replace("-", "_")
        registered = {"registry": self.registry}
        self.requests = prometheus.Counter(f"{prefix}_requests", "Requests", ["path", "status"], **registered)
        self.rows = prometheus.Counter(f"{prefix}_rows", "Rows computed", ["path"], **registered)
        self.seconds = prometheus.Histogram(
            f"{prefix}_seconds", "Time from a request's first byte to its answer", ["path"], **registered
        )

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def metrics(self) -> "Response":
        prometheus = require("prometheus_client", EXTRA)
        registry = self.registry
        if os.environ.get(SHARED_METRICS):
            registry = prometheus.CollectorRegistry()
            require("prometheus_client.multiprocess", EXTRA).MultiProcessCollector(registry)
        response = require("fastapi", EXTRA).Response
        answer: Response = response(prometheus.generate_latest(registry), media_type=prometheus.CONTENT_TYPE_LATEST)
        return answer

    def handler(self, endpoint: Endpoint) -> Callable[..., Any]:
        """The coroutine that answers requests of one endpoint."""

        async def handle(request: Any) -> "Response":
            start = time.perf_counter()
            try:
                answer = await self.answer(endpoint, request)
            except RefusalError as refusal:
                answer = json_response(refusal.status, {"error": str(refusal)})
            except Exception:
                _LOGGER.exception("%s %s failed", self.name, endpoint.path)
                answer = json_response(500, {"error": "internal error; the service's log has it"})
            self.requests.labels(endpoint.path, str(answer.status_code)).inc()
            self.seconds.labels(endpoint.path).observe(time.perf_counter() - start)
            return answer

        handle.__annotations__["request"] = require("fastapi", EXTRA).Request
        return handle

    async def answer(self, endpoint: Endpoint, request: "Request") -> "Response":
        """Read, parse, compute and encode, each within its limits."""
        kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
        kind = "application/json" if kind == _UNSAID else kind
        if kind not in {"application/json", ARROW}:
            raise RefusalError(415, f"content-type: expected application/json or {ARROW}, got {kind}")
        if self.waiting >= self.limits.waiting:
            raise RefusalError(503, f"{self.limits.waiting} requests are already running or queued; try again")
        self.waiting += 1
        try:
            body = await self.body(request)
        except BaseException:
            self.waiting -= 1
            raise
        arrow = ARROW in request.headers.get("accept", "")
        work = asyncio.get_running_loop().run_in_executor(self.pool, self.compute, endpoint, kind, body, arrow)
        work.add_done_callback(self.done)  # one that timed out keeps its thread, and its place, until it ends
        try:
            return await asyncio.wait_for(asyncio.shield(work), self.limits.answer_seconds)
        except TimeoutError:
            raise RefusalError(504, f"the answer took longer than {self.limits.answer_seconds:g} s") from None

    def done(self, work: "asyncio.Future[Response]") -> None:
        """Make room; an error that nobody waits for any more has been answered with 504."""
        self.waiting -= 1
        if not work.cancelled():
            work.exception()

    async def body(self, request: "Request") -> bytes:
        """The body, unless it is too large or too slow."""
        most = self.limits.body_bytes
        too_large = RefusalError(413, f"body: expected at most {most} bytes")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            raise too_large
        pieces, size = [], 0

        async def read() -> None:
            nonlocal size
            async for piece in request.stream():
                size += len(piece)
                if size > most:
                    raise too_large
                pieces.append(piece)

        try:
            await asyncio.wait_for(read(), self.limits.body_seconds)
        except TimeoutError:
            raise RefusalError(408, f"body: not complete after {self.limits.body_seconds:g} s") from None
        return b"".join(pieces)

    def compute(self, endpoint: Endpoint, kind: str, body: bytes, arrow: bool) -> "Response":
        """What runs in the pool."""
        try:
            parse = parse_arrow if kind == ARROW else parse_json
            rows, options = parse(body, endpoint.schema, self.limits.rows)
            columns = endpoint.compute(rows, options)
        except (ValueError, TypeError) as error:
            raise RefusalError(400, " ".join(str(error).split())) from error
        self.rows.labels(endpoint.path).inc(rows.num_rows)
        return arrow_response(columns) if arrow else json_response(200, columns)

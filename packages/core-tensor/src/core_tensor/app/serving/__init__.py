"""HTTP service of a model: rows in, columns out, as JSON or Arrow, with health, metrics and limits.

    class Scorer:
        schema = pyarrow.schema([("user", pyarrow.string()), ("price", pyarrow.float32())])
        def score(self, rows: pyarrow.Table, options: dict) -> dict:
            return {"score": ...}

    serve(functools.partial(build, "model.onnx"), port=8080)   # build returns application("lirank", [Endpoint(...)])

`POST` an endpoint with `{"rows": [{"user": "a", "price": 3.5}, ...], "options": {...}}` as `application/json`, or with
an Arrow IPC stream as `application/vnd.apache.arrow.stream`; the answer comes in the form that `Accept` asks for, by
default JSON: one list per column. `GET /health` says what is served, `GET /metrics` is for Prometheus. Errors are JSON,
`{"error": "..."}`: 400 bad rows, 408 slow body, 413 too large, 415 other format, 503 too many at once, 504 took too
long.

Needs the extra `core-tensor[serving]`.
"""

from core_tensor.app.serving.bodies import ARROW
from core_tensor.app.serving.processes import serve
from core_tensor.app.serving.service import Endpoint, Limits, application

__all__ = ["ARROW", "Endpoint", "Limits", "application", "serve"]

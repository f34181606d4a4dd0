"""From a log to calibrated scores, in Python: prepare, train, compare with LightGBM, export, score a request."""

import tempfile
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
from lirank import ModelConfig, ParquetLog, Split, TrainConfig
from lirank.evidence.generator import Market, generate
from lirank.features.prepare import Prepared
from lirank.serve import deploy
from lirank.serve.scorer import Scorer, request_schema
from lirank.workflow import calibrate_run, prepared_baselines, sample, train_run


def main(events: int = 20_000) -> dict[str, float]:
    """Run everything on a generated log; returns AUCs on the last tenth of the time."""
    made = generate(Market(users=200, items=100, events=events, ids=1.0, history=1.0))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("run", "calibrated"):
            (folder / name).mkdir()
        pq.write_table(made.log, folder / "log.parquet", row_group_size=4096)
        log = ParquetLog.open(folder / "log.parquet")

        # 1. train: history and popularity from strictly earlier rows, the last tenth of the time tests
        config, training = ModelConfig(dim=8, widths=(32, 16)), TrainConfig(epochs=2, batch_size=512)
        trained = train_run(log, made.schema, Split(), config, training, folder / "run")
        prepared = Prepared(folder / "run" / "data", trained["rows"], trained["notes"])
        beside = prepared_baselines(prepared)[made.market.label]

        # 2. refresh the calibration on the validation rows, export tables and calibration as one graph
        calibrate_run(folder / "run", None, folder / "calibrated")
        deploy.export(*sample(folder / "calibrated"), folder / "model.onnx")

        # 3. score a request with the exported model, as the HTTP service does
        scorer = Scorer.open(folder / "calibrated", folder / "model.onnx")
        request = made.log.slice(made.log.num_rows - 3).select(request_schema(made.schema).names)
        tomorrow = pc.add(request["time"], 86_400)  # a request from before the end of the log would be refused
        request = request.set_column(request.column_names.index("time"), "time", tomorrow)
        print("scores of a request:", scorer.score(request)[:, 0].round(3))
        return {name: entry["auc"] for name, entry in beside.items()} | {
            "lirank": trained["test"][made.market.label]["auc"]
        }


if __name__ == "__main__":
    for model, auc in main().items():
        print(f"{model:20s} {auc:.4f}")

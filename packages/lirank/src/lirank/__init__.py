"""LiRank: ranking models with history, calibration, compression and serving, trained on your Parquet logs."""

from typing import TYPE_CHECKING

from core_tensor.app.exports import lazy

if TYPE_CHECKING:
    from lirank.data.batch import Batch, Encoder
    from lirank.data.parquet import ParquetLog
    from lirank.data.split import Split
    from lirank.features.causal import CausalFeatures
    from lirank.features.prepare import prepare
    from lirank.layers.cross import CrossNetwork
    from lirank.layers.experts import MultiTask
    from lirank.layers.gate import LHUC, DenseGate
    from lirank.layers.history import HistoryTransformer
    from lirank.layers.isotonic import IsotonicLayer
    from lirank.layers.residual_cross import ResidualCross
    from lirank.layers.table import FusedTable
    from lirank.model.config import ModelConfig
    from lirank.model.ranker import Ranker
    from lirank.schema.features import Schema, load_schema
    from lirank.train.loop import TrainConfig, Trainer
    from lirank.train.row_optimizers import RowOptimizer
    from lirank.train.run import TrainedModel

__all__ = [
    "LHUC",
    "Batch",
    "CausalFeatures",
    "CrossNetwork",
    "DenseGate",
    "Encoder",
    "FusedTable",
    "HistoryTransformer",
    "IsotonicLayer",
    "ModelConfig",
    "MultiTask",
    "ParquetLog",
    "Ranker",
    "ResidualCross",
    "RowOptimizer",
    "Schema",
    "Split",
    "TrainConfig",
    "TrainedModel",
    "Trainer",
    "load_schema",
    "prepare",
]

__getattr__, __dir__, _ = lazy(__name__)

"""LiMAML: per-member vectors learned without retraining, refreshed, stored and served."""

from typing import TYPE_CHECKING

from core_tensor.app.exports import lazy

if TYPE_CHECKING:
    from meta_embed.adapt.maml import InnerOptions
    from meta_embed.adapt.map_head import MapHead, logit_variance, thompson
    from meta_embed.config import Config, read_config
    from meta_embed.evaluate.mixture import Mixture, fit_mixture
    from meta_embed.generate.job import GenerateOptions
    from meta_embed.generate.refresh import refresh
    from meta_embed.model.build import build_model, load_model, save_model
    from meta_embed.model.global_block import GlobalBlock
    from meta_embed.model.meta_model import MetaModel
    from meta_embed.serve.lookup import Lookup
    from meta_embed.store.address import create_store, open_store
    from meta_embed.store.base import Store
    from meta_embed.tasks.events import Events, build_events, read_table
    from meta_embed.tasks.schema import Feature, Schema
    from meta_embed.train.outer import fit

__all__ = [
    "Config",
    "Events",
    "Feature",
    "GenerateOptions",
    "GlobalBlock",
    "InnerOptions",
    "Lookup",
    "MapHead",
    "MetaModel",
    "Mixture",
    "Schema",
    "Store",
    "build_events",
    "build_model",
    "create_store",
    "fit",
    "fit_mixture",
    "load_model",
    "logit_variance",
    "open_store",
    "read_config",
    "read_table",
    "refresh",
    "save_model",
    "thompson",
]

__getattr__, __dir__, _ = lazy(__name__)

"""Generators trained by Frechet distance or optimal transport in feature space."""

from frechet_gan.distance import frechet_distance
from frechet_gan.encoders import FrozenEncoder, efficientnet_lite, encode, load_encoder
from frechet_gan.estimators import Estimate, debiased_split_distance, estimate_frechet
from frechet_gan.gaussian import GaussianMap, frechet_distance_from_moments, gaussian_map
from frechet_gan.loss import MultiEncoderLoss, TransportLoss, VirtualBatch
from frechet_gan.manifold import Manifold, manifold
from frechet_gan.mmd import cmmd, kid, mmd
from frechet_gan.plans import PlanOptions
from frechet_gan.populations import BatchPopulation, EMAPopulation, QueuePopulation
from frechet_gan.stats import FeatureStats

__all__ = [
    "BatchPopulation",
    "EMAPopulation",
    "Estimate",
    "FeatureStats",
    "FrozenEncoder",
    "GaussianMap",
    "Manifold",
    "MultiEncoderLoss",
    "PlanOptions",
    "QueuePopulation",
    "TransportLoss",
    "VirtualBatch",
    "cmmd",
    "debiased_split_distance",
    "efficientnet_lite",
    "encode",
    "estimate_frechet",
    "frechet_distance",
    "frechet_distance_from_moments",
    "gaussian_map",
    "kid",
    "load_encoder",
    "manifold",
    "mmd",
]

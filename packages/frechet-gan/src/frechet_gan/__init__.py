"""Generators trained by Frechet distance or optimal transport in feature space."""

from frechet_gan.distance import frechet_distance
from frechet_gan.encoders import FrozenEncoder, efficientnet_lite, encode, load_encoder
from frechet_gan.estimators import Estimate, debiased_split_distance, estimate_frechet
from frechet_gan.gaussian import GaussianMap, frechet_distance_from_moments, gaussian_map
from frechet_gan.stats import FeatureStats

__all__ = [
    "Estimate",
    "FeatureStats",
    "FrozenEncoder",
    "GaussianMap",
    "debiased_split_distance",
    "efficientnet_lite",
    "encode",
    "estimate_frechet",
    "frechet_distance",
    "frechet_distance_from_moments",
    "gaussian_map",
    "load_encoder",
]

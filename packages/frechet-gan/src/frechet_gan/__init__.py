"""Generators trained by Frechet distance or optimal transport in feature space."""

from typing import TYPE_CHECKING

from core_tensor.app.exports import lazy

if TYPE_CHECKING:
    from frechet_gan.encoders.adapters import efficientnet_lite
    from frechet_gan.encoders.classifier import Classifier, train_classifier
    from frechet_gan.encoders.frozen import FrozenEncoder, encode
    from frechet_gan.encoders.inception import inception
    from frechet_gan.encoders.registry import load_encoder
    from frechet_gan.evaluation.compare import fid
    from frechet_gan.evaluation.manifold import Manifold, manifold
    from frechet_gan.evaluation.report import Alarms, EncoderReport, Report, effective_rank, evaluate
    from frechet_gan.frechet.distance import frechet_distance
    from frechet_gan.frechet.estimators import Estimate, debiased_split_distance, estimate_frechet
    from frechet_gan.frechet.gaussian import GaussianMap, frechet_distance_from_moments, gaussian_map
    from frechet_gan.frechet.stats import FeatureStats
    from frechet_gan.training.checkpoints import load_generator, read_checkpoint
    from frechet_gan.training.config import PRESETS, TrainConfig
    from frechet_gan.training.networks import Discriminator, NetworkConfig, Networks
    from frechet_gan.training.posttrain import PosttrainConfig, PostTrainer, encoder_losses
    from frechet_gan.training.sampling import interpolate, sample_images
    from frechet_gan.training.trainer import FrechetTrainer
    from frechet_gan.transport.loss import MultiEncoderLoss, TransportLoss
    from frechet_gan.transport.mmd import cmmd, kid, mmd
    from frechet_gan.transport.plans import PlanOptions
    from frechet_gan.transport.populations import BatchPopulation, EMAPopulation, QueuePopulation
    from frechet_gan.transport.virtual_batch import VirtualBatch

__all__ = [
    "PRESETS",
    "Alarms",
    "BatchPopulation",
    "Classifier",
    "Discriminator",
    "EMAPopulation",
    "EncoderReport",
    "Estimate",
    "FeatureStats",
    "FrechetTrainer",
    "FrozenEncoder",
    "GaussianMap",
    "Manifold",
    "MultiEncoderLoss",
    "NetworkConfig",
    "Networks",
    "PlanOptions",
    "PostTrainer",
    "PosttrainConfig",
    "QueuePopulation",
    "Report",
    "TrainConfig",
    "TransportLoss",
    "VirtualBatch",
    "cmmd",
    "debiased_split_distance",
    "effective_rank",
    "efficientnet_lite",
    "encode",
    "encoder_losses",
    "estimate_frechet",
    "evaluate",
    "fid",
    "frechet_distance",
    "frechet_distance_from_moments",
    "gaussian_map",
    "inception",
    "interpolate",
    "kid",
    "load_encoder",
    "load_generator",
    "manifold",
    "mmd",
    "read_checkpoint",
    "sample_images",
    "train_classifier",
]

__getattr__, __dir__, _ = lazy(__name__)

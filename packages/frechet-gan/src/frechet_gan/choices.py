"""What options may be, for the library and its command line; nothing here loads torch."""

from typing import Literal

Estimator = Literal["plugin", "fid_inf", "vale2", "rtd"]
ESTIMATORS: tuple[Estimator, ...] = ("plugin", "fid_inf", "vale2", "rtd")

PlanName = Literal["gaussian", "mean", "bures", "assignment", "sinkhorn", "sliced", "max_sliced", "mmd"]
PLANS: tuple[PlanName, ...] = ("gaussian", "mean", "bures", "assignment", "sinkhorn", "sliced", "max_sliced", "mmd")

GLoss = Literal["adversarial"] | PlanName
DLoss = Literal["bce", "hinge", "wgan", "frechet"]
D_LOSSES: tuple[DLoss, ...] = ("bce", "hinge", "wgan", "frechet")

Kind = Literal["mlp", "dcgan", "resnet"]
KINDS: tuple[Kind, ...] = ("mlp", "dcgan", "resnet")

METHODS = (
    *("frechet", "frechet-features", "ot", "ot-layers", "sinkhorn", "sliced", "max-sliced", "mmd", "advfd"),
    *("ns", "ns-layers", "hinge", "wgan-gp"),
)
"""Names of the presets of `training.config`."""

Resize = Literal["native", "clean", "legacy-tf", "legacy-pytorch"]
RESIZES: tuple[Resize, ...] = ("native", "clean", "legacy-tf", "legacy-pytorch")

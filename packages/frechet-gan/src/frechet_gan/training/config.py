"""How to train: the options of a run, and the methods by name."""

from dataclasses import dataclass, field, replace
from typing import Literal

from core_tensor.checks import check_choice, check_number

from frechet_gan.choices import D_LOSSES, PLANS, DLoss, GLoss
from frechet_gan.transport.populations import BatchPopulation, Population


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        g_loss: The generator's loss: a transport plan in the discriminator's features, or `adversarial`.
        d_loss: `bce`, `hinge`, `wgan`, or `frechet`: features learned to maximise the whitened distance.
        r1: Weight γ of R1 on real images; 0 for none.
        gp: Weight of WGAN-GP's penalty; 0 for none.
        n_dis: Discriminator steps per generator step.
        batch: Images per discriminator step and rank.
        g_batch: Images per generator step and rank; `batch` if None.
        micro_batch: Largest part of a generator step that is held in memory; larger steps take two exact passes.
        layers: Random projections per layer, drawn anew at every step, that the transport loss compares: of the pixels
            and of every layer of the discriminator. 0 compares its last feature layer alone, as the paper does.
        normalize: Normalization of the transport loss: `none`, `sg`, or `whiten` (with `d_loss` `frechet` only:
            features that classify are ruined by it).
        population: Whose features the transport loss compares: the batch's, those of a queue, or moving averages. A
            past needs a space that stays: `layers` 0.
        adversarial_weight: Weight of the adversarial loss added to a transport loss.
        lr_g: Learning rate of the generator.
        lr_d: Learning rate of the discriminator.
        betas: Adam's decay rates.
        ema: Decay of the averaged generator that samples are drawn from; 0 for none.
        diff_augment: Whether the discriminator sees augmented images only.
        bf16: Whether networks run in bfloat16 (statistics stay in float64).
        seed: Seed of weights, data order and latents.
    """

    g_loss: GLoss = "gaussian"
    d_loss: DLoss = "bce"
    r1: float = 1.0
    gp: float = 0.0
    n_dis: int = 1
    batch: int = 128
    g_batch: int | None = None
    micro_batch: int | None = None
    layers: int = 12
    normalize: Literal["none", "sg", "whiten"] = "sg"
    population: Population = field(default_factory=BatchPopulation)
    adversarial_weight: float = 0.0
    lr_g: float = 2e-3
    lr_d: float = 2e-3
    betas: tuple[float, float] = (0.5, 0.99)
    ema: float = 0.98
    diff_augment: bool = False
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("g_loss", self.g_loss, ("adversarial", *PLANS))
        check_choice("d_loss", self.d_loss, D_LOSSES)
        for name in ("n_dis", "batch"):
            check_number(name, getattr(self, name), low=1, integer=True)
        for name in ("r1", "gp", "adversarial_weight"):
            check_number(name, getattr(self, name), low=0)
        for name in ("lr_g", "lr_d"):
            check_number(name, getattr(self, name), low=0, open_low=True)
        check_number("ema", self.ema, low=0, high=1, open_high=True)
        check_number("layers", self.layers, low=0, integer=True)
        if self.normalize == "whiten" and self.d_loss != "frechet" and self.g_loss != "adversarial":
            raise ValueError("normalize: expected whiten with d_loss 'frechet' only; features that classify are ruined")
        if self.layers and self.d_loss == "frechet":
            raise ValueError("layers: expected 0 with d_loss 'frechet', which learns the feature layer alone")
        if self.layers and not isinstance(self.population, BatchPopulation):
            raise ValueError("layers: expected 0 with a population of the past: projections change at every step")
        if self.d_loss == "frechet" and (self.g_loss == "adversarial" or self.adversarial_weight):
            raise ValueError("g_loss: expected a transport plan with d_loss 'frechet', which learns no logit")


_ONE_LAYER = TrainConfig(layers=0, normalize="none", lr_g=1e-3, lr_d=1e-3)
_ADVERSARIAL = TrainConfig(g_loss="adversarial", layers=0, normalize="none", lr_g=1e-3, lr_d=1e-3)
PRESETS: dict[str, TrainConfig] = {
    "frechet": TrainConfig(),
    "frechet-features": _ONE_LAYER,
    "ot": replace(_ONE_LAYER, g_loss="assignment"),
    "ot-layers": TrainConfig(g_loss="assignment"),
    "sinkhorn": replace(_ONE_LAYER, g_loss="sinkhorn"),
    "sliced": replace(_ONE_LAYER, g_loss="sliced"),
    "max-sliced": replace(_ONE_LAYER, g_loss="max_sliced"),
    "mmd": replace(_ONE_LAYER, g_loss="mmd"),
    "advfd": replace(_ONE_LAYER, d_loss="frechet", normalize="whiten"),
    "ns": _ADVERSARIAL,
    "ns-layers": TrainConfig(adversarial_weight=1.0),
    "hinge": replace(_ADVERSARIAL, d_loss="hinge", r1=0.0),
    "wgan-gp": replace(_ADVERSARIAL, d_loss="wgan", r1=0.0, gp=10.0, n_dis=3),
}
"""Methods by the name the command line takes: `frechet-features` is the paper's, in the last feature layer alone;
`frechet` compares every layer; `hinge` is meant for a network with spectral norm."""

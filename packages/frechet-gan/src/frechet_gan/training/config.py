"""How to train: the options of a run, and the methods by name."""

from dataclasses import dataclass
from typing import Literal

from core_tensor.checks import check_choice, check_number

from frechet_gan.choices import D_LOSSES, PLANS, DLoss, GLoss


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
        normalize: Normalisation of the transport loss: `none`, `sg` or `whiten`.
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
    normalize: Literal["none", "sg", "whiten"] = "none"
    adversarial_weight: float = 0.0
    lr_g: float = 5e-4
    lr_d: float = 5e-4
    betas: tuple[float, float] = (0.5, 0.99)
    ema: float = 0.0
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
        if self.d_loss == "frechet" and (self.g_loss == "adversarial" or self.adversarial_weight):
            raise ValueError("g_loss: expected a transport plan with d_loss 'frechet', which learns no logit")


PRESETS: dict[str, TrainConfig] = {
    "frechet": TrainConfig(),
    "ot": TrainConfig(g_loss="assignment"),
    "sinkhorn": TrainConfig(g_loss="sinkhorn"),
    "sliced": TrainConfig(g_loss="sliced"),
    "max-sliced": TrainConfig(g_loss="max_sliced"),
    "mmd": TrainConfig(g_loss="mmd"),
    "advfd": TrainConfig(d_loss="frechet", normalize="whiten"),
    "ns": TrainConfig(g_loss="adversarial"),
    "hinge": TrainConfig(g_loss="adversarial", d_loss="hinge", r1=0.0),
    "wgan-gp": TrainConfig(g_loss="adversarial", d_loss="wgan", r1=0.0, gp=10.0, n_dis=3),
}
"""Methods by the name the command line takes; `hinge` is meant for a network with spectral norm."""

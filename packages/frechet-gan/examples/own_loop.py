"""The Frechet loss in a training loop of your own, and an evaluation by an encoder that the generator never saw.

    python examples/own_loop.py

The discriminator learns to classify (with R1); the generator never sees its verdict, only the distance between the
features of real and generated images.
"""

import torch
from frechet_gan import TransportLoss, evaluate, train_classifier
from frechet_gan.images.data import digits
from frechet_gan.training.objectives import r1_penalty
from torch import Tensor, nn
from torch.nn.functional import softplus

LATENT, FEATURES = 32, 32


def networks() -> tuple[nn.Module, nn.Module, nn.Module]:
    """A generator, the trunk of a discriminator and its head."""
    generator = nn.Sequential(
        nn.Linear(LATENT, 128), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)),
    )  # fmt: skip
    trunk = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, FEATURES), nn.LeakyReLU(0.2)
    )
    return generator, trunk, nn.Linear(FEATURES, 1)


def train(images: Tensor, steps: int) -> nn.Module:
    """Alternate classification by the discriminator with transport by the generator."""
    generator, trunk, head = networks()
    discriminator = nn.Sequential(trunk, head)
    g_optimizer = torch.optim.Adam(generator.parameters(), 5e-4, (0.5, 0.99))
    d_optimizer = torch.optim.Adam(discriminator.parameters(), 5e-4, (0.5, 0.99))
    loss = TransportLoss("gaussian")  # or assignment, sinkhorn, sliced, max_sliced, mmd
    for _ in range(steps):
        real, fresh = images[torch.randint(len(images), (2, 128))]  # (128, 1, 8, 8) each
        fake = generator(torch.randn(128, LATENT))
        classify = softplus(-discriminator(real)).mean() + softplus(discriminator(fake.detach())).mean()
        classify = classify + r1_penalty(lambda x: discriminator(x)[:, 0], real)
        d_optimizer.zero_grad()
        classify.backward()
        d_optimizer.step()
        distance = loss(trunk(fake), trunk(fresh))  # no gradient reaches the real side
        g_optimizer.zero_grad()
        distance.backward()
        g_optimizer.step()
    return generator.eval()


def main(steps: int = 600) -> dict[str, float]:
    """Train, then report what an independent classifier thinks of the samples."""
    torch.manual_seed(0)
    data = digits()
    generator = train(data.images, steps)
    judge = train_classifier(data.images, data.labels, seed=1)

    @torch.no_grad()
    def sampler(count: int, seed: int) -> Tensor:
        return generator(torch.randn(count, LATENT, generator=torch.Generator().manual_seed(seed)))

    report = evaluate(sampler, data.images, heldout={"classifier": judge}, estimators=["plugin", "rtd"], seeds=3)
    view = report.encoders[0]
    print(f"Frechet distance  {view.distance['plugin']:.2f} plug-in, {view.distance['rtd']:.2f} debiased (rtd)")
    print(f"against real      {report.fdr:.2f} times what held-back real digits score")
    print(f"precision, recall {view.precision:.2f}, {view.recall:.2f}; effective rank {view.rank:.2f} of the real one")
    print("alarms            " + ("; ".join(report.alarms) or "none"))
    return {"distance": view.distance["plugin"], "fdr": report.fdr}


if __name__ == "__main__":
    main()

"""New members for a ranker that is already trained: its item vectors in, a vector for every member out.

    python examples/fold_in.py [-o fold_in.png]

1. A matrix factorization stands for the ranker. It is trained on some members and frozen.
2. Members it has never seen arrive. `MapHead` learns the prior of their vectors, through the solution, from other
   members' histories: what a profile says, and how much to trust it.
3. Each newcomer's first events give a vector and its uncertainty. Nothing is retrained.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from core_tensor.app import figures
from meta_embed import MapHead, logit_variance
from meta_embed.evaluate.metrics import auc
from meta_embed.evidence.generator import make_world
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as log_loss

SIZES, ASKED, WIDTH = (0, 2, 4, 8, 16, 32), 40, 6


def train_ranker(member: Tensor, item: Tensor, clicked: Tensor, members: int, items: int) -> tuple[Tensor, Tensor]:
    """Logit = bias of the item + item vector ' member vector; returns biases and item vectors."""
    torch.manual_seed(0)
    bias = torch.zeros(items, requires_grad=True)
    vectors = torch.randn(items, WIDTH).mul(0.1).requires_grad_()
    people = torch.zeros(members, WIDTH, requires_grad=True)
    optimizer = torch.optim.Adam([bias, vectors, people], lr=0.02)
    for epoch in range(8):
        for pick in torch.randperm(len(item), generator=torch.Generator().manual_seed(epoch)).split(2048):
            z = bias[item[pick]] + (vectors[item[pick]] * people[member[pick]]).sum(1)
            loss = log_loss(z, clicked[pick]) + 0.02 * people[member[pick]].square().sum(1).mean()
            optimizer.zero_grad(), loss.backward(), optimizer.step()
    return bias.detach(), vectors.detach()


def main(out: Path) -> list[float]:
    """The three steps; returns the AUC on later events for each support size."""
    table = make_world(1500, items=150, d=WIDTH, longest=60, least=max(SIZES) + ASKED).table
    member, item, clicked = (torch.from_numpy(table[name].to_numpy().copy()) for name in ("member", "item", "clicked"))
    profile = torch.from_numpy(np.stack(table["profile"].to_numpy(zero_copy_only=False)))
    first = torch.from_numpy(np.searchsorted(member.numpy(), np.arange(1500)))  # of each member's events
    known = member < 500
    bias, vectors = train_ranker(member[known], item[known], clicked[known], 500, 150)

    def task(members: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors after the first n events of some members, and the rows they are asked about."""
        rows = (first[members, None] + torch.arange(n)).flatten()
        lengths = torch.full((len(members),), n)
        e, H = head(
            vectors[item[rows]],
            bias[item[rows]],
            clicked[rows],
            torch.ones(len(rows)),
            lengths,
            profile[first[members]],
        )
        asked = first[members, None] + max(SIZES) + torch.arange(ASKED)
        z = bias[item[asked]] + (vectors[item[asked]] * e[:, None]).sum(2)
        return z, clicked[asked], logit_variance(vectors[item[asked[:, 0]]], H)

    head = MapHead(torch.nn.Linear(profile.shape[1], WIDTH), WIDTH)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    for step in range(120):
        some = torch.randint(500, 1000, (128,), generator=torch.Generator().manual_seed(step))
        z, y, _ = task(some, SIZES[step % len(SIZES)])
        optimizer.zero_grad(), log_loss(z, y).backward(), optimizer.step()

    newcomers, areas = torch.arange(1000, 1500), []
    print("events  AUC     standard deviation of a logit")
    for n in SIZES:
        with torch.no_grad():
            z, y, variance = task(newcomers, n)
        areas.append(auc(z.flatten().numpy(), y.flatten().numpy()))
        print(f"{n:6d}  {areas[-1]:.4f}  {variance.sqrt().mean():.2f}")
    plt = figures.pyplot("meta-embed[plot]")
    figure, axis = plt.subplots(figsize=(5, 3.4))
    axis.plot(range(len(SIZES)), areas, marker="o", label="vector from the first events")
    axis.axhline(
        auc(bias[item[member >= 1000]].numpy(), clicked[member >= 1000].numpy()),
        color="gray",
        label="item biases alone",
    )
    axis.set(xlabel="events of a newcomer", ylabel="AUC on later events", title="a frozen ranker, members it never saw")
    axis.set_xticks(range(len(SIZES)), [str(n) for n in SIZES])
    axis.legend()
    figures.save(figure, out)
    return areas


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("fold_in.png"))
    main(parser.parse_args().out)

"""Watch a CNN learn digits: is its learning rate stable, what would be, and which images decide it?

    python examples/digits_monitor.py

Needs `pip install 'sgd-stability[demo]'`. Writes digits_history.png and digits_map.png.
"""

import warnings

import torch
from sgd_stability import InstabilityWarning, StabilityMonitor
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main(epochs: int = 6, lr: float = 0.05, batch_size: int = 16) -> dict[str, float]:
    """Train, watch, analyse."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images[:512], dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target[:512])
    loader = DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=True)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 16, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    # The monitor hooks into optimizer.step(); the training loop stays as it is.
    monitor = StabilityMonitor(model, "cross_entropy", loader, every=32, every_cheap=16).attach(optimizer)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("once", InstabilityWarning)
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                losses.append((monitor.steps, loss.item()))
    for check in monitor.history:
        print(check)
    monitor.plot("digits_history.png", losses=losses)

    # The full analysis, with the optimizer's momentum, on 64 of the 512 images.
    report = monitor.exact(max_samples=64)
    print(report)
    for size in (4, 16, 64):
        print(f"batch size {size:3d}: largest stable rate {report.lr_threshold(size).exact:.3g} (estimate)")
    report.stability_map().plot("digits_map.png", "digits CNN, momentum 0.9")
    return {"checks": len(monitor.history), "threshold": report.lr_threshold(batch_size).exact}


if __name__ == "__main__":
    main()

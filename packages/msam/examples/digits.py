"""mSAM on scikit-learn's digits: one changed line, a check that it perturbs, and what it buys in flatness."""

import torch
from msam import MSAM
from msam.study.data import mlp
from msam.study.flatness import flatness
from sklearn.datasets import load_digits
from torch.nn import functional as F


def main(epochs: int = 15) -> dict[str, dict[str, float]]:
    """Train the same network twice and compare."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, test = (x[:1200], y[:1200]), (x[1200:], y[1200:])
    results = {}
    for micro_batches in (1, 8):  # 1 is SAM
        torch.manual_seed(0)
        model = mlp(64, 256, 256, 10)
        opt = MSAM(model, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1, num_micro_batches=micro_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs)

        def loss_fn(batch: tuple[torch.Tensor, torch.Tensor], model: torch.nn.Module = model) -> torch.Tensor:
            return F.cross_entropy(model(batch[0]), batch[1])

        checked = opt.check(loss_fn, (train[0][:128], train[1][:128]))
        print(f"m = {micro_batches}: {checked.mode}, gradient changed by {checked.gradient_change:.0%}")
        for _ in range(epochs):
            for index in torch.randperm(1200).split(128):
                opt.step(loss_fn, (train[0][index], train[1][index]))
            schedule.step()
        accuracy = 100 * float((model(test[0]).argmax(1) == test[1]).float().mean())
        report = flatness(model, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), train)
        results[f"m={micro_batches}"] = {"test": accuracy, "lambda_max": report.lambda_max, "trace": report.trace}
        print(f"       test {accuracy:.1f} %, lambda_max {report.lambda_max:.2f}, trace {report.trace:.0f}")
    return results


if __name__ == "__main__":
    main()

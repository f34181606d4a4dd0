"""Benchmarks of sgd-stability: `uvx nox -s bench -- sgd-stability [--quick] [--json] [--only KEY]`."""

import functools
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch
from architectures import architectures
from core_tensor.dev.benchmarking import compare, run_bars
from core_tensor.linalg.spectrum import hessian_operator, lanczos
from large import top_eig_100m
from sgd_stability import (
    SCHEMES,
    CurvatureFamily,
    Sampling,
    all_bounds,
    analyze,
    lr_threshold,
)
from sgd_stability.curvature.ghost import gram
from sgd_stability.curvature.jacobian import weighted_jacobian
from sgd_stability.curvature.losses import resolve_loss
from sgd_stability.curvature.network import make_network
from sgd_stability.demo import digits, digits_network
from sgd_stability.report.nonlinear import interpolate, verify
from sgd_stability.theory.quadratic import random_hessians
from torch import Tensor, nn
from training_bars import OVERHEADS, digits_cnn, overhead, ramps, scheduler_bars

ALIGNMENTS = ("isotropic", "aligned", "clustered", "dominant")
RESIDUAL = 1e-3


def random_family(seed: int, largest_d: int) -> tuple[Tensor, int]:
    """Dense Hessians and a batch size."""
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(2, 14)), int(rng.integers(1, largest_d + 1))
    rank = int(rng.integers(1, d + 1))
    return random_hessians(n, d, rank, ALIGNMENTS[seed % 4], seed=seed), int(rng.integers(1, n + 1))


def dense_threshold(H: Tensor, sampling: Sampling) -> float:
    """eta* from dense Kronecker matrices on range(H), with none of the package's reductions."""
    values, vectors = torch.linalg.eigh(H.mean(0))
    V = vectors[:, values > 1e-12 * values[-1]]
    G = V.T @ H @ V
    h, eye = G.mean(0), torch.eye(V.shape[1], dtype=H.dtype)
    D = torch.kron(h, eye) + torch.kron(eye, h)
    noise = torch.einsum("iab,icd->acbd", G, G).reshape(D.shape) / len(H)
    Q = sampling.a * torch.kron(h, h) + sampling.s * noise
    last = len(D) - 1
    return 1 / float(scipy.linalg.eigh(Q.numpy(), D.numpy(), eigvals_only=True, subset_by_index=[last, last])[0])


def kronecker(_: bool) -> Mapping[str, Any]:
    """The exact threshold against the dense second-moment matrix: 200 families, three schemes."""
    worst = 0.0
    for seed in range(200):
        H, B = random_family(seed, 12)
        family = CurvatureFamily.from_hessians(H)
        for scheme in SCHEMES:
            sampling = Sampling(len(H), B, scheme)
            worst = max(worst, abs(lr_threshold(family, sampling).value / dense_threshold(H, sampling) - 1))
    return {"threshold_vs_kronecker_max_rel_error": worst}


def violations(_: bool) -> Mapping[str, Any]:
    """Every bound that claims to hold, on 1,000 families per scheme."""
    count, checked = 0, 0
    for scheme in SCHEMES:
        for seed in range(1000):
            H, B = random_family(10_000 + seed, 6)
            sampling = Sampling(len(H), B, scheme)
            exact = dense_threshold(H, sampling)
            for bound in all_bounds(CurvatureFamily.from_hessians(H), sampling):
                wrong = (bound.side == "stable_below" and bound.lr > exact * (1 + 1e-9)) or (
                    bound.side == "unstable_above" and bound.lr < exact * (1 - 1e-9)
                )
                count += wrong
                checked += bound.side != "heuristic"
    return {"bound_violations_in_3000": count, "bound_violations_in_3000_detail": {"bounds_checked": checked}}


def nonlinear(_: bool) -> Mapping[str, Any]:
    """SGD on the tanh MLP at its minimum, at 0.8 and 1.2 of the predicted threshold."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1)]
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(64, 6).double(), torch.randn(64, 1).double()
    loss = interpolate(model, x, y)
    thresholds = analyze(model, "squared_error", (x, y)).max_lr([1, 4, 16])
    trials = verify(model, "squared_error", x, y, thresholds)
    right = sum(t.outcome == ("returns" if t.lr < thresholds[t.batch_size] else "leaves") for t in trials)
    distances = {
        outcome: [round(f(t.distance for t in trials if t.outcome == outcome), 3) for f in (min, max)]
        for outcome in {t.outcome for t in trials}
    }
    return {
        "nonlinear_runs_classified": right,
        "nonlinear_runs_classified_detail": {"runs": len(trials), "training_loss": loss, "distance": distances},
    }


@functools.cache
def digits_mlp(n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A digits MLP of 8,970 parameters, trained for a while by Adam."""
    model = digits_network(0, hidden=64)
    x, y = digits(n)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(150):
        adam.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        adam.step()
    return model, x, y


def ghost(quick: bool) -> Mapping[str, Any]:
    """Gram matrix by the ghost route against vmap(jacrev) and a product."""
    model, x, y = digits_mlp(128)
    network = make_network(model, resolve_loss("cross_entropy"), x, y)

    def explicit() -> Tensor:
        Z = weighted_jacobian(network).flatten(0, 1)
        return Z @ Z.T

    ours, theirs = gram(network), explicit()
    timing = compare(lambda: gram(network), explicit, pairs=5 if quick else 15)
    return {
        "ghost_gram_vs_jacobian": timing.speedup,
        "ghost_gram_rel_difference": float((ours - theirs).norm() / theirs.norm()),
        "ghost_gram_vs_jacobian_detail": timing.spread(),
    }


def lean_top_eigenvalue() -> tuple[float, float]:
    """Ours: the eigenvalue and its relative residual."""
    model, x, y = digits_cnn()
    operator = hessian_operator(lambda: nn.functional.cross_entropy(model(x[:256]), y[:256]), model.parameters())
    found = lanczos(operator, tolerance=RESIDUAL, generator=torch.Generator().manual_seed(0))
    return float(found.values[0]), float(found.residuals[0] / found.values[0])


def relative_residual(value: float, vector: Tensor) -> float:
    """||Hv - value v|| / value, by our operator."""
    model, x, y = digits_cnn()
    operator = hessian_operator(lambda: nn.functional.cross_entropy(model(x[:256]), y[:256]), model.parameters())
    v = vector / vector.norm()
    return float((operator(v) - value * v).norm()) / value


def pyhessian(quick: bool) -> Mapping[str, Any]:
    """PyHessian's power iteration, run for the iterations it needs to reach our residual."""
    from pyhessian import hessian

    model, x, y = digits_cnn()
    pair = (x[:256], y[:256])

    def solve(iterations: int, tolerance: float) -> tuple[float, Tensor]:
        torch.manual_seed(0)
        values, vectors = hessian(model, nn.CrossEntropyLoss(), data=pair, cuda=False).eigenvalues(
            maxIter=iterations, tol=tolerance, top_n=1
        )
        model.zero_grad()
        return values[0], torch.cat([v.reshape(-1) for v in vectors[0]])

    needed = 4
    while relative_residual(*solve(needed, 0.0)) > RESIDUAL and needed < 400:
        needed += max(1, needed // 4)
    own_value, own_vector = solve(100, 1e-3)  # its own stopping rule
    timing = compare(lean_top_eigenvalue, lambda: solve(needed, 0.0), pairs=5 if quick else 15)
    own = compare(lean_top_eigenvalue, lambda: solve(100, 1e-3), pairs=5 if quick else 15)
    value, residual = lean_top_eigenvalue()
    return {
        "top_eig_vs_pyhessian": timing.ratio,
        "top_eig_vs_pyhessian_detail": {
            **timing.spread(),
            "iterations": needed,
            "residuals": [residual, relative_residual(*solve(needed, 0.0))],
            "ratio_at_its_own_stop": own.ratio,
            "its_own_residual": relative_residual(own_value, own_vector),
            "value_at_its_own_stop": own_value / value,
        },
    }


def curvlinops(quick: bool) -> Mapping[str, Any]:
    """Curvlinops' Hessian operator under scipy's eigsh, to the same residual."""
    from curvlinops import HessianLinearOperator

    model, x, y = digits_cnn()
    data = [(x[:256], y[:256])]

    def solve() -> tuple[float, Tensor]:
        parameters = list(model.parameters())
        hessian = HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
        operator = hessian.to_scipy()
        start = np.random.default_rng(0).normal(size=operator.shape[0]).astype(np.float32)
        values, vectors = scipy.sparse.linalg.eigsh(operator, k=1, which="LA", tol=RESIDUAL, v0=start)
        return float(values[0]), torch.from_numpy(vectors[:, 0].copy()).float()

    timing = compare(lean_top_eigenvalue, solve, pairs=5 if quick else 15)
    value, residual = lean_top_eigenvalue()
    theirs = solve()
    return {
        "top_eig_vs_curvlinops": timing.ratio,
        "top_eig_vs_curvlinops_detail": {
            **timing.spread(),
            "values": [value, theirs[0]],
            "residuals": [residual, relative_residual(*theirs)],
        },
    }


def truncated(_: bool) -> Mapping[str, Any]:
    """Forty eigenvectors of H against the exact Gram route: digits MLP, cross-entropy, B = 1."""
    model, x, y = digits_mlp(128)
    start = time.process_time()
    report = analyze(model, "cross_entropy", (x, y), method="gram")
    nested = report.lr_threshold(1).exact
    middle = time.process_time()
    upper = analyze(model, "cross_entropy", (x, y), method="truncated", k=40).lr_threshold(1).upper
    spent = {"gram_s": middle - start, "truncated_s": time.process_time() - middle}
    exact = lr_threshold(report.family, Sampling(report.n, 1)).value  # on all directions, no nested subspaces
    detail = {"exact": exact, "nested_rel_error": nested / exact - 1, **spent}
    return {"truncated40_rel_error": upper / exact - 1, "truncated40_rel_error_detail": detail}


if __name__ == "__main__":
    run_bars(
        "sgd-stability",
        {
            "threshold_vs_kronecker_max_rel_error": kronecker,
            "bound_violations_in_3000": violations,
            "nonlinear_runs_classified": nonlinear,
            "ghost_gram_vs_jacobian": ghost,
            "top_eig_vs_pyhessian": pyhessian,
            "top_eig_vs_curvlinops": curvlinops,
            "truncated40_rel_error": truncated,
            "top_eig_100m_parameters": top_eig_100m,
            "architectures_exact": architectures,
            "ramp_alarms_before_doubling": ramps,
            "scheduler_vs_best_fixed_median": scheduler_bars,
            **{f"monitor_overhead_{name}": functools.partial(overhead, name) for name in OVERHEADS},
        },
    )

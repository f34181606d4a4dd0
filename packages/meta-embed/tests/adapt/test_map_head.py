import pytest
import torch
from meta_embed.adapt.map_head import MapHead, logit_variance, thompson
from meta_embed.model.blocks import MemberBlock
from scipy.optimize import minimize
from torch.nn.functional import softplus

F64 = torch.float64


def _head(width=4, precision=2.0):
    torch.manual_seed(0)
    head = MapHead(MemberBlock([3], 2, 5, width), width, precision).double()
    with torch.no_grad():
        head.lower.normal_(std=0.3)
    return head


def _support(lengths, width=4):
    g = torch.Generator().manual_seed(2)
    rows = sum(lengths)
    h = torch.randn(rows, width, generator=g, dtype=F64)
    base = torch.randn(rows, generator=g, dtype=F64)
    y = (torch.rand(rows, generator=g) < 0.5).double()
    w = torch.rand(rows, generator=g, dtype=F64)
    member = (torch.randint(0, 3, (len(lengths), 1), generator=g), torch.randn(len(lengths), 2, generator=g, dtype=F64))
    return h, base, y, w, torch.tensor(lengths), *member


def test_vectors_are_those_scipy_finds():
    head, lengths = _head(), [0, 3, 9, 1]
    h, base, y, w, n, *member = _support(lengths)
    e, H = head(h, base, y, w, n, *member)
    mu, P = head.prior(*member), head.precision
    start = 0
    for t, count in enumerate(lengths):
        part = slice(start, start + count)
        start += count

        def objective(x, part=part, t=t):
            x = torch.tensor(x, requires_grad=True)
            z = base[part] + h[part] @ x
            F = (w[part] * (softplus(z) - y[part] * z)).sum() + 0.5 * (x - mu[t]) @ P @ (x - mu[t])
            return float(F.detach()), torch.autograd.grad(F, x)[0].detach().numpy()

        found = minimize(objective, mu[t].detach().numpy(), jac=True, method="BFGS", options={"gtol": 1e-10})
        assert torch.allclose(e[t], torch.from_numpy(found.x), atol=1e-6)
    assert torch.equal(e[0], mu[0])
    assert torch.allclose(H[0], P)


def test_the_prior_is_learned_through_the_solution():
    head = _head()
    h, base, y, w, n, *member = _support([4, 6, 2])
    e, _ = head(h, base, y, w, n, *member)
    e.square().sum().backward()
    for name, p in head.named_parameters():
        assert p.grad is not None, name
    assert float(head.lower.grad.triu().abs().max()) == 0.0
    assert float(head.log_scale.grad.abs().min()) > 0


def test_draws_have_the_posterior_covariance():
    head = _head()
    h, base, y, w, n, *member = _support([5, 0])
    e, H = head(h, base, y, w, n, *member)
    e, H = e.detach(), H.detach()
    g = torch.Generator().manual_seed(0)
    draws = thompson(e.repeat(20_000, 1), H.repeat(20_000, 1, 1), g).view(20_000, 2, 4)
    assert torch.allclose(draws.mean(0), e, atol=0.03)
    for t in (0, 1):
        assert torch.allclose(torch.cov(draws[:, t].T), torch.linalg.inv(H[t]), atol=0.03)
    row = torch.randn(2, 4, generator=g, dtype=F64)
    expected = (row[:, None] @ torch.linalg.inv(H) @ row[..., None]).flatten()
    assert torch.allclose(logit_variance(row, H), expected)


def test_bad_precision():
    with pytest.raises(ValueError, match="precision: expected a positive number"):
        MapHead(torch.nn.Identity(), 3, 0.0)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_the_solve_is_exact_under_autocast_and_labels_may_be_booleans(kind):
    """Prior and item vectors may come in half precision; the solve of them does not."""
    head = _head().float()
    h, base, y, w, n, *member = _support([4, 0, 6])
    half, features = h.to(kind), (member[0], member[1].float())
    with torch.autocast("cpu", dtype=kind):
        mu = head.prior(*features)
        e, H = head(half, base.to(kind), y.bool(), w.to(kind), n, *features)
    fixed = MapHead(torch.nn.Identity(), 4)
    fixed.load_state_dict({name: value for name, value in head.state_dict().items() if not name.startswith("prior")})
    expected, precision = fixed(half.float(), base.to(kind).float(), y.float(), w.to(kind).float(), n, mu.float())
    assert e.dtype == H.dtype == torch.float32
    assert torch.equal(e, expected)
    assert torch.equal(H, precision)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([3, 4]), ValueError, "expected them to sum to the 10 rows of the supports, got 7"),
        (torch.tensor([-1, 0, 11]), ValueError, "expected at least 0, got -1"),
        (torch.tensor([4, 0, 6], dtype=torch.int32), TypeError, "expected dtype torch.int64"),
        ([4, 0, 6], TypeError, "expected a torch.Tensor, got list"),
    ],
)
def test_bad_lengths(lengths, error, message):
    h, base, y, w, _, *member = _support([4, 0, 6])
    with pytest.raises(error, match=f"lengths: {message}"):
        _head()(h, base, y, w, lengths, *member)

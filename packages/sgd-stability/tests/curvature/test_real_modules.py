"""Modules that people train: every route against a dense float64 matrix of per-sample Hessians."""

import pytest
import torch
from core_tensor.dev.testing import assert_close
from core_tensor.linalg.spectrum import lanczos
from sgd_stability import StabilityMonitor, analyze
from sgd_stability.curvature.gauss_newton import gauss_newton_operator, gauss_newton_product
from sgd_stability.curvature.ghost import gram, sample_blocks
from sgd_stability.curvature.jacobian import derivatives, weighted_jacobian
from sgd_stability.curvature.losses import resolve_loss
from sgd_stability.curvature.network import bare, call, make_network, unflatten
from sgd_stability.curvature.sample_curvature import sample_directions
from sgd_stability.curvature.truncated import loss_hessian_operator, projected_family, projected_hessians
from torch import nn


class LastStep(nn.Module):
    """A recurrent layer and a linear one on its last output."""

    def __init__(self, cell, width):
        super().__init__()
        self.cell, self.head = cell, nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Encoder(nn.Module):
    """PyTorch's own encoder layer, whose fast path and fused attention are on by default."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Bag(nn.Module):
    def __init__(self, mode, sparse=False):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(11, 4, mode=mode, sparse=sparse), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.bag(x))


class Tied(nn.Module):
    """Input and output embedding are one, and a row of it pads."""

    def __init__(self, padding=None):
        super().__init__()
        self.embed, self.middle = nn.Embedding(7, 4, padding_idx=padding), nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(torch.tanh(self.middle(self.embed(x)))).mean(1)


class Scaled(nn.Module):
    """Parameters that belong to no layer: a matrix used twice, and a temperature without dimensions."""

    def __init__(self):
        super().__init__()
        self.weight, self.temperature = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        hidden = torch.tanh(x @ self.weight) @ self.weight.T
        return hidden[:, :3] * self.temperature.exp()


class Padded(nn.Module):
    """An embedding with a row that pads, a norm, and a convolution over positions."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 4, padding_idx=0), nn.LayerNorm(4)
        self.conv, self.head = nn.Conv1d(4, 3, 2), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(self.norm(self.embed(x)).mT)).mean(2))


def _transformer(kind):
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    text = {**common, "vocab_size": 13, "max_position_embeddings": 16}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=13, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, num_key_value_heads=1))
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**text, num_labels=3))
    image = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**common, **image))


def _weight_norm(function):
    return nn.Sequential(function(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


def _old_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return _weight_norm(nn.utils.weight_norm)


def _floats(*shape):
    return lambda n: torch.randn(n, *shape)


def _tokens(vocabulary, length=4):
    return lambda n: torch.randint(0, vocabulary, (n, length))


def _text(n):
    return {"input_ids": torch.randint(0, 13, (n, 5)), "attention_mask": torch.ones(n, 5, dtype=torch.int64)}


CASES = {
    "encoder": (Encoder, _floats(3, 8)),
    "lstm": (lambda: LastStep(nn.LSTM(3, 4, 2, batch_first=True), 4), _floats(4, 3)),
    "bidirectional": (lambda: LastStep(nn.LSTM(3, 4, batch_first=True, bidirectional=True), 8), _floats(4, 3)),
    "gru": (lambda: LastStep(nn.GRU(3, 4, batch_first=True), 4), _floats(4, 3)),
    "rnn": (lambda: LastStep(nn.RNN(3, 4, batch_first=True), 4), _floats(4, 3)),
    "bag": (lambda: Bag("mean"), _tokens(11)),
    "sparse bag": (lambda: Bag("sum", sparse=True), _tokens(11)),
    "sparse embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Tanh(), nn.Linear(16, 3)),
        _tokens(7),
    ),
    "bag of maxima": (lambda: Bag("max"), _tokens(11)),
    "weight norm": (lambda: _weight_norm(nn.utils.parametrizations.weight_norm), _floats(4)),
    "old weight norm": (_old_weight_norm, _floats(4)),
    "spectral norm": (lambda: _weight_norm(nn.utils.parametrizations.spectral_norm), _floats(4)),
    "tied": (Tied, _tokens(7)),
    "tied and padded": (lambda: Tied(0), _tokens(7)),
    "padded": (Padded, _tokens(7)),
    "scalar": (Scaled, _floats(4)),
    "bert": (lambda: _transformer("bert"), _text),
    "vit": (lambda: _transformer("vit"), lambda n: {"pixel_values": torch.randn(n, 1, 8, 8)}),
    "gpt2": (lambda: _transformer("gpt2"), lambda n: {"input_ids": torch.randint(0, 13, (n, 3))}),
    "llama": (lambda: _transformer("llama"), lambda n: {"input_ids": torch.randint(0, 13, (n, 3))}),
}
LANGUAGE = {"gpt2", "llama"}
EXACT = {"llama": 1e-6}
"""Relative errors allowed; Llama's norms and rotations compute in float32 whatever the model's precision is."""


def _double(value):
    if isinstance(value, dict):
        return {name: _double(v) for name, v in value.items()}
    return value.double() if value.is_floating_point() else value


def _network(name, n=5):
    torch.manual_seed(0)
    build, draw = CASES[name]
    model = build().double().eval()
    inputs = _double(draw(n))
    targets = inputs["input_ids"] if name in LANGUAGE else torch.arange(n) % 3
    loss = "causal_lm" if name in LANGUAGE else "cross_entropy"
    return model, loss, inputs, targets, make_network(model, resolve_loss(loss), inputs, targets)


def _oracle(network):
    """Z_i by one plain backward pass per output and sample: torch.autograd.grad on the model as it is."""
    parameters, rows = list(network.parameters.values()), []
    for i in range(network.n):
        one = network.part(i, i + 1)
        z = call(one.model, one.inputs).reshape(-1)
        J = [torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True) for value in z]
        J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in J])
        rows.append(one.factor.transpose_times(J[None])[0].detach())
    return torch.stack(rows)


def _error(reference, got):
    """Root mean square of the difference over that of the reference."""
    assert reference.shape == got.shape
    return float((reference - got).norm() / reference.norm())


def route_errors(name):
    """Relative errors of every route that claims an exact number; `benchmarks/architectures.py` reports them."""
    model, loss, inputs, targets, network = _network(name)
    Z = _oracle(network)
    flat = Z.flatten(0, 1)
    H = flat.T @ flat / network.n
    scale = torch.linspace(0.5, 2.0, network.size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(network.size, generator=generator, dtype=torch.float64)
    V, _ = torch.linalg.qr(torch.randn(network.size, 4, generator=generator, dtype=torch.float64))
    product, family = gauss_newton_product(network, v), projected_family(network, V)
    top = torch.linalg.eigvalsh(H)[-1:]
    curvature = torch.linalg.eigvalsh(Z @ Z.mT)[:, -1]
    report = analyze(model, loss, (inputs, targets), method="gram")
    band = analyze(model, loss, (inputs, targets), method="truncated", k=8).lr_threshold(2)
    assert band.upper >= report.lr_threshold(2).exact * (1 - 1e-6)
    assert band.upper == pytest.approx(report.lr_threshold(2).exact, rel=0.1)
    worst = int(curvature.argmax())
    direction = sample_directions(network, curvature, 1)[:, 0]
    return {
        "jacobian": _error(Z, weighted_jacobian(network)),
        "gram": _error(flat @ flat.T, gram(network)),
        "blocks": _error(Z @ Z.mT, sample_blocks(network)),
        "blocks, preconditioned": _error((Z * scale) @ (Z * scale).mT, sample_blocks(network, scale=scale)),
        "product": _error(H @ v, product.product),
        "quadratic forms": _error((Z @ v).square().sum(1), product.forms),
        "compressed": _error(torch.linalg.eigvalsh(V.T @ H @ V), family.h.flip(0)),
        "sharpness": _error(top, torch.tensor([report.lambda_max], dtype=torch.float64)),
        "sample curvature": _error(curvature, report.family.sample_curvature),
        "sample direction": _error(curvature[worst], (Z[worst] @ direction).square().sum()),
    }


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_every_route_is_the_dense_matrix(name):
    found = route_errors(name)
    assert max(found.values()) <= EXACT.get(name, 1e-8), found


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in CASES if name != "tied and padded"])  # whose gradient is no gradient
def test_the_true_hessian_is_the_difference_of_gradients(name):
    _, _, _, _, network = _network(name, n=3)
    torch.manual_seed(1)
    V = torch.randn(2, network.size, dtype=torch.float64)
    V = torch.stack([torch.cat([d.reshape(-1) for d in network.direction(v).values()]) for v in V])  # padding rows rest
    V, _ = torch.linalg.qr(V.T)
    H = loss_hessian_operator(network)
    parameters = list(network.parameters.values())

    def gradient():
        loss = network.loss.values(call(network.model, network.inputs), network.targets).mean()
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, materialize_grads=True)])

    step, images = 1e-5, []
    for v in V.T:
        pieces = unflatten(v, network.parameters)
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                for key, p in network.parameters.items():
                    p.add_(pieces[key], alpha=sign * step)
            found.append(gradient())
            with torch.no_grad():
                for key, p in network.parameters.items():
                    p.add_(pieces[key], alpha=-sign * step)
        images.append((found[0] - found[1]) / (2 * step))
    expected = torch.stack(images, 1)
    found = torch.stack([H(v) for v in V.T], 1)
    slack = 3e-2 if name == "llama" else 1e-6  # its norms compute in float32, which differences show
    assert_close("Hv", expected, found, slack)
    dense = projected_hessians(network, V)
    # the compressed mean, in whatever basis the family has
    assert_close("V'HV", torch.linalg.eigvalsh(V.T @ found), dense.h.sort().values, max(slack, 1e-5))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_stands_in_for_forward_mode_is_said():
    modes = {name: derivatives(_network(name)[4]) for name in CASES}
    assert {modes[name] for name in ("encoder", "lstm", "gru", "rnn", "tied", "vit", "gpt2", "padded")} == {
        "forward mode"
    }
    assert modes["weight norm"] == modes["old weight norm"] == modes["tied and padded"] == "double backward"
    assert modes["bag"] == "finite differences"
    model, loss, inputs, targets, _ = _network("bag")
    report = analyze(model, loss, (inputs, targets), method="truncated", k=6)
    assert report.derivatives == "finite differences"
    assert report.derivatives in str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    methods = ("gram", "jacobian", "truncated")
    single = [analyze(model, "cross_entropy", (x, y), method=method, k=16) for method in methods]
    exact = single[0]
    model.to(dtype)
    for method, expected in zip(methods, single, strict=True):
        report = analyze(model, "cross_entropy", (x, y), method=method, k=16)
        assert report.lambda_max == pytest.approx(expected.lambda_max, rel=0.05)
        assert report.lr_threshold(2).upper == pytest.approx(expected.lr_threshold(2).upper, rel=0.1)
    found = lanczos(gauss_newton_operator(make_network(model, resolve_loss("cross_entropy"), x.to(dtype), y)))
    assert float(found.values[0]) == pytest.approx(exact.lambda_max, rel=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    check = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=2).attach(optimizer).check()
    assert check.lambda1 == pytest.approx(exact.lambda_max, rel=0.1)


def test_attention_is_left_as_it_was():
    model, _, inputs, _, network = _network("encoder")
    assert torch.backends.mha.get_fastpath_enabled()
    gauss_newton_product(network, torch.randn(network.size, dtype=torch.float64))
    assert torch.backends.mha.get_fastpath_enabled()
    assert bare(model) is model
    assert model(inputs).shape == (5, 3)


def test_a_batch_of_long_sequences_is_taken_in_pieces(monkeypatch):
    """The logits of a language model are never held for the whole probe."""
    from sgd_stability.curvature import network as module

    torch.manual_seed(0)
    sizes = []

    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(50, 4), nn.Linear(4, 50)

        def forward(self, tokens):
            z = self.out(self.embed(tokens))
            sizes.append(z.numel() if z.ndim == 3 else 0)
            return z

    monkeypatch.setattr(module, "_NUMBERS", 4 * 8 * 50)
    model, tokens = Bigram(), torch.randint(0, 50, (32, 9))
    x, y = tokens[:, :-1], tokens[:, 1:].contiguous()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = StabilityMonitor(model, "token_cross_entropy", (x, y), batch_size=4).attach(optimizer)
    monitor.check()
    report = analyze(model, "token_cross_entropy", (x, y), method="truncated", k=4)
    assert max(sizes) <= 4 * 8 * 50
    assert report.mean_loss > 3

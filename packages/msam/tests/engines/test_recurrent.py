"""LSTM, GRU and plain recurrent layers, which ghost mode decomposes."""

import copy

import pytest
import torch
from msam import MSAM
from torch import nn
from torch.nn import functional as F


class Tagger(nn.Module):
    """A recurrent layer between an embedding and a head; the last states count too."""

    def __init__(self, layer, ways=1):
        super().__init__()
        self.tokens, self.layer, self.head = nn.Embedding(20, 6), layer, nn.Linear(5 * ways, 20)

    def forward(self, ids):
        x = self.tokens(ids)
        y, last = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        y = y if self.layer.batch_first else y.transpose(0, 1)
        return self.head(torch.tanh(y)), last


class Cells(nn.Module):
    """A cell in a loop."""

    def __init__(self, cell):
        super().__init__()
        self.tokens, self.cell, self.head = nn.Embedding(20, 6), cell, nn.Linear(5, 20)

    def forward(self, ids):
        x, state, found = self.tokens(ids), None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(found, 1)), state


LAYERS = {
    "lstm": lambda: Tagger(nn.LSTM(6, 5, batch_first=True)),
    "gru": lambda: Tagger(nn.GRU(6, 5, batch_first=True)),
    "rnn": lambda: Tagger(nn.RNN(6, 5, nonlinearity="relu")),
    "two layers, both ways": lambda: Tagger(nn.LSTM(6, 5, 2, bidirectional=True), 2),
    "gru of two layers without biases": lambda: Tagger(nn.GRU(6, 5, 2, bias=False, bidirectional=True), 2),
    "lstm cell": lambda: Cells(nn.LSTMCell(6, 5)),
    "gru cell": lambda: Cells(nn.GRUCell(6, 5)),
}


def loss_of(model):
    def loss_fn(part):
        logits, last = model(part[0])
        states = last if isinstance(last, tuple) else (last,)
        return F.cross_entropy(logits.flatten(0, 1), part[1].flatten()) + sum(s.square().mean() for s in states)

    return loss_fn


def trained(model, mode, ascent, freeze=()):
    torch.manual_seed(1)
    for name in freeze:
        model.get_parameter(name).requires_grad_(False)
    opt = MSAM(
        model, torch.optim.SGD, [p for p in model.parameters() if p.requires_grad], lr=0.1, rho=0.3,
        num_micro_batches=3, mode=mode, ascent=ascent,
    )  # fmt: skip
    for _ in range(3):
        batch = torch.randint(20, (10, 7)), torch.randint(20, (10, 7))
        opt.step(loss_of(model), batch)
        assert opt.record.mode == mode
    return torch.cat([p.detach().flatten() for p in model.parameters()]), opt.record.gradient_norms


@pytest.mark.parametrize("ascent", ["full", "chained"])
@pytest.mark.parametrize("kind", LAYERS)
def test_recurrent_layers_equal_sequential_mode(double, kind, ascent):
    model = LAYERS[kind]()
    truth, norms = trained(copy.deepcopy(model), "sequential", ascent)
    found, own = trained(model, "ghost", ascent)
    assert float((found - truth).norm() / truth.norm()) < 1e-12
    torch.testing.assert_close(own, norms, rtol=1e-9, atol=0)


@pytest.mark.parametrize("freeze", [("layer.weight_ih_l0",), ("layer.weight_hh_l0", "layer.bias_hh_l0")])
def test_frozen_weights(double, freeze):
    model = LAYERS["lstm"]()
    truth, _ = trained(copy.deepcopy(model), "sequential", "full", freeze)
    found, _ = trained(model, "ghost", "full", freeze)
    assert float((found - truth).norm() / truth.norm()) < 1e-12

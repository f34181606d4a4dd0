"""The recipes for Lightning, the HF Trainer and accelerate, run for a few steps against a plain loop."""

import copy
import warnings

import pytest
import torch
from msam import MSAM
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture(autouse=True)
def _foreign_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frameworks' own deprecations and advice
        yield


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(48, 8, generator=generator), torch.randint(3, (48,), generator=generator)


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    from msam.lightning import MSAMMixin

    class Classifier(MSAMMixin, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

        def msam_loss(self, batch):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            opt = MSAM(self, torch.optim.SGD, lr=0.1, momentum=0.9, num_micro_batches=3, clip_norm=0.5)
            return [opt], [torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)]

    torch.manual_seed(0)
    module = Classifier()
    twin = copy.deepcopy(module.net)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=12))
    opt = MSAM(twin, torch.optim.SGD, lr=0.1, momentum=0.9, num_micro_batches=3, clip_norm=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    for _ in range(2):
        for batch in DataLoader(TensorDataset(*data()), batch_size=12):
            opt.step(lambda part: F.cross_entropy(twin(part[0]), part[1]), batch)
        schedule.step()
    assert trainer.optimizers[0].record.mode == "ghost"
    assert trainer.global_step == 8
    for p, q in zip(module.net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


class Bag(nn.Module):
    """The least model that the Trainer takes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer(tmp_path, accumulate):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from msam.hf import MSAMTrainer

    torch.manual_seed(0)
    model, (x, y) = Bag(), data()
    twin = copy.deepcopy(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=12 // accumulate, gradient_accumulation_steps=accumulate,
        num_train_epochs=1, learning_rate=0.01, lr_scheduler_type="constant", report_to=[], use_cpu=True,
        max_grad_norm=0.5, weight_decay=0.1, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        adam_epsilon=1e-3,
    )  # fmt: skip

    class InOrder(MSAMTrainer):
        def _get_train_sampler(self, *unused):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    trainer = InOrder(
        model=model, args=arguments, train_dataset=rows, num_micro_batches=6 // accumulate, msam={"mode": "ghost"}
    )
    trainer.train()
    groups = [
        {"params": [p for n, p in twin.named_parameters() if "bias" not in n], "weight_decay": 0.1},
        {"params": [p for n, p in twin.named_parameters() if "bias" in n], "weight_decay": 0.0},
    ]
    opt = MSAM(twin, torch.optim.AdamW, groups, lr=0.01, eps=1e-3, num_micro_batches=6, clip_norm=0.5)
    for start in range(0, 48, 12):
        opt.step(lambda part: twin(part[0], part[1])["loss"], (x[start : start + 12], y[start : start + 12]))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model, (x, y) = Bag(), data()
    twin = copy.deepcopy(model)
    accelerator = accelerate.Accelerator(cpu=True)
    opt = MSAM(model, torch.optim.SGD, lr=0.1, num_micro_batches=3)
    loader = DataLoader([{"x": a, "labels": b} for a, b in zip(x, y, strict=True)], batch_size=12)
    wrapped, prepared, loader = accelerator.prepare(model, opt, loader)
    for batch in loader:
        prepared.optimizer.backward(lambda part: wrapped(**part)["loss"], batch, scaler=accelerator.scaler)
        prepared.step()
        prepared.zero_grad()
    reference = MSAM(twin, torch.optim.SGD, lr=0.1, num_micro_batches=3)
    for start in range(0, 48, 12):
        reference.step(lambda part: twin(part[0], part[1])["loss"], (x[start : start + 12], y[start : start + 12]))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_transformers_models_run_in_ghost_mode(double, oracle, kind):
    transformers = pytest.importorskip("transformers")
    if kind.startswith("Bert"):
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(
            vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=8, num_labels=3, pad_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    model = getattr(transformers, kind)(config).double()
    batch = {"input_ids": torch.randint(1, 50, (6, 8)), "labels": torch.randint(3, (6,))}
    found = []
    for mode in ("sequential", "ghost"):
        model.zero_grad()
        opt = MSAM(model, torch.optim.AdamW, lr=0.1, rho=0.2, num_micro_batches=3, mode=mode)
        opt.backward(lambda part: model(**part).loss, batch)
        assert opt.record.mode == mode
        found.append(oracle.gradients(model))
    assert oracle.relative_error(found[1], found[0]) < 1e-12

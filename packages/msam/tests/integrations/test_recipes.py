"""The recipes for Lightning, the HF Trainer and accelerate, run for a few steps against a plain loop."""

import copy
import os
import tempfile
import warnings

import pytest
import torch
from core_tensor.dev.testing import run_ranks
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
    from msam.integrations.lightning import MSAMMixin

    class Classifier(MSAMMixin, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

        def msam_loss(self, batch):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            opt = MSAM(self, torch.optim.SGD, lr=0.1, momentum=0.9, num_micro_batches=3, mode="ghost", clip_norm=0.5)
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


def rates(folder, make_schedule, metric=None, epochs=3):
    """The learning rate after each of 4 batches per epoch, from a rate of 1; a loss named `fixed` never falls."""
    lightning = pytest.importorskip("lightning")
    from msam.integrations.lightning import MSAMMixin

    seen = []

    class Classifier(MSAMMixin, lightning.LightningModule):
        plateau_metric = metric

        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, 3)

        def msam_loss(self, batch):
            self.log("fixed", 1.0)
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            opt = MSAM(self, torch.optim.SGD, lr=1.0, num_micro_batches=3)
            return {"optimizer": opt, "lr_scheduler": make_schedule(opt)}

        def on_train_batch_end(self, *unused):
            seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Classifier(), DataLoader(TensorDataset(*data()), batch_size=12))
    return seen


def test_lightning_honours_the_frequency_of_schedulers(tmp_path):
    def halving(interval):
        return lambda opt: {
            "scheduler": torch.optim.lr_scheduler.StepLR(opt, 1, 0.5), "interval": interval, "frequency": 2,
        }  # fmt: skip

    assert rates(tmp_path, halving("step"), epochs=1) == [1.0, 0.5, 0.5, 0.25]
    assert rates(tmp_path, halving("epoch")) == [1.0] * 8 + [0.5] * 4


def test_lightning_tells_a_plateau_its_metric(tmp_path):
    def plateau(opt):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0)

    assert rates(tmp_path, plateau, "fixed") == [1.0] * 8 + [0.5] * 4
    with pytest.raises(ValueError, match="plateau_metric: expected the name"):
        rates(tmp_path, plateau)
    with pytest.raises(ValueError, match=r"plateau_metric: expected one of .*'sharpness_gap'.* got 'missing'"):
        rates(tmp_path, plateau, "missing")


class Bag(nn.Module):
    """The least model that the Trainer takes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def rows(x, y):
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


def run_trainer(model, x, y, folder, *, batch_size, accumulate=1, **options):
    """One epoch of AdamW over the rows as they come."""
    import transformers
    from msam.integrations.hf import MSAMTrainer

    class InOrder(MSAMTrainer):
        def _get_train_sampler(self, *unused):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulate,
        num_train_epochs=1, learning_rate=0.01, lr_scheduler_type="constant", report_to=[], use_cpu=True,
        max_grad_norm=0.5, weight_decay=0.1, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        adam_epsilon=1e-3,
    )  # fmt: skip
    trainer = InOrder(model=model, args=arguments, train_dataset=rows(x, y), **options)
    trainer.train()
    return trainer.optimizer.optimizer.record


def run_like_the_trainer(model, x, y, *, batch_size, num_micro_batches, rho=0.05):
    """The same in a plain loop."""
    groups = [
        {"params": [p for n, p in model.named_parameters() if "bias" not in n], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if "bias" in n], "weight_decay": 0.0},
    ]
    opt = MSAM(
        model, torch.optim.AdamW, groups, lr=0.01, eps=1e-3, rho=rho, num_micro_batches=num_micro_batches,
        clip_norm=0.5,
    )  # fmt: skip
    for batch in zip(x.split(batch_size), y.split(batch_size), strict=True):
        opt.step(lambda part: model(part[0], part[1])["loss"], batch)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer(tmp_path, accumulate):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model, (x, y) = Bag(), data()
    twin = copy.deepcopy(model)
    run_trainer(
        model, x, y, tmp_path, batch_size=12 // accumulate, accumulate=accumulate,
        num_micro_batches=6 // accumulate, msam={"mode": "ghost"},
    )  # fmt: skip
    run_like_the_trainer(twin, x, y, batch_size=12, num_micro_batches=6)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def run_accelerate(model, x, y, *, batch_size, **options):
    """One epoch of SGD over the rows as they come, as the docs of `msam.hf` have it."""
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    wrapped = accelerator.prepare(model)
    opt = MSAM(wrapped, torch.optim.SGD, lr=0.1, **options)
    prepared, loader = accelerator.prepare(opt, DataLoader(rows(x, y), batch_size=batch_size))
    for batch in loader:
        prepared.optimizer.backward(lambda part: wrapped(**part)["loss"], batch, scaler=accelerator.scaler)
        prepared.step()
        prepared.zero_grad()
    return opt.record


def run_like_accelerate(model, x, y, *, batch_size, **options):
    """The same in a plain loop."""
    opt = MSAM(model, torch.optim.SGD, lr=0.1, **options)
    for batch in zip(x.split(batch_size), y.split(batch_size), strict=True):
        opt.step(lambda part: model(part[0], part[1])["loss"], batch)


def test_accelerate():
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model, (x, y) = Bag(), data()
    twin = copy.deepcopy(model)
    run_accelerate(model, x, y, batch_size=12, num_micro_batches=3, mode="ghost")
    run_like_accelerate(twin, x, y, batch_size=12, num_micro_batches=3, mode="ghost")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


TWO_RANKS = [(recipe, mode) for recipe in ("trainer", "accelerate") for mode in ("sequential", "ghost")]


def one_rank(rank, world_size):
    """Every recipe and mode in one pair of processes, because starting them takes longer than they do."""
    warnings.simplefilter("ignore")
    for name in ("", "LOCAL_"):  # as torchrun does
        os.environ |= {f"{name}RANK": str(rank), f"{name}WORLD_SIZE": str(world_size)}
    found = {}
    for recipe, mode in TWO_RANKS:
        torch.manual_seed(0)
        model, (x, y) = Bag().double(), data()
        options = {"batch_size": 12, "num_micro_batches": 3, "rho": "auto"}
        if recipe == "trainer":
            with tempfile.TemporaryDirectory() as folder:
                record = run_trainer(model, x.double(), y, folder, **options, msam={"mode": mode})
        else:
            record = run_accelerate(model, x.double(), y, **options, mode=mode)
        found[recipe, mode] = [p.detach() for p in model.parameters()], record.mode, record.rho
    return found


@pytest.fixture(scope="module")
def ranks():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return run_ranks(one_rank, 2)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("recipe", "mode"), TWO_RANKS)
def test_two_ranks_equal_one_process_with_twice_the_micro_batches(ranks, recipe, mode):
    torch.manual_seed(0)
    model, (x, y) = Bag().double(), data()
    like = run_like_the_trainer if recipe == "trainer" else run_like_accelerate
    like(model, x.double(), y, batch_size=24, num_micro_batches=6, rho="auto")
    for weights, used, rho in (found[recipe, mode] for found in ranks):
        # the Trainer asks DDP to find unused parameters, by an autograd.Function that vmap cannot run
        assert used == ("sequential" if recipe == "trainer" else mode)
        assert rho == pytest.approx(0.05 / 6**0.5)
        torch.testing.assert_close(weights, [p.detach() for p in model.parameters()], rtol=1e-9, atol=1e-12)


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


def test_causal_tokens_weigh_micro_batches_as_the_models_own_loss_does(seeded):
    transformers = pytest.importorskip("transformers")
    from msam.integrations.hf import causal_tokens, valid_tokens

    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(2, 50, (8, 8))
    labels = ids.masked_fill(torch.arange(8) >= 2 + torch.arange(8)[:, None] % 6, -100)
    batch = {"input_ids": ids, "labels": labels}
    assert causal_tokens(batch) == valid_tokens(batch) - 8
    with torch.no_grad():
        truth = float(model(**batch).loss)
    for mode in ("sequential", "ghost"):
        opt = MSAM(model, torch.optim.SGD, lr=0.0, num_micro_batches=4, mode=mode, shard_weight=causal_tokens)
        assert float(opt.step(lambda part: model(**part).loss, batch)) == pytest.approx(truth, rel=1e-6)
        assert opt.record.mode == mode

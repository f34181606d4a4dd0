import pytest
import torch
from sgd_stability import StabilityMonitor
from sgd_stability.monitor.callbacks import OutputField, lightning_callback, trainer_callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, features, labels=None):
        from transformers.modeling_outputs import SequenceClassifierOutput

        logits = self.linear(features)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@pytest.mark.slow
def test_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = Classifier()
    x, y = torch.randn(32, 4), torch.randint(0, 3, (32,))
    monitor = StabilityMonitor(OutputField(model), "cross_entropy", ({"features": x}, y), batch_size=8, every=4)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=8, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=[{"features": a, "labels": b} for a, b in zip(x, y, strict=True)],
        callbacks=[trainer_callback(monitor)],
    )
    trainer.train()
    assert [c.step for c in monitor.history] == [4, 8]
    assert sum("stability/lr_upper" in entry for entry in trainer.state.log_history) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's own advice on workers, loggers and checkpoints
def test_lightning(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.seen = nn.Linear(4, 3), []

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    x, y = torch.randn(32, 4), torch.randint(0, 3, (32,))
    module = Module()
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    monitor = StabilityMonitor(module.net, "cross_entropy", loader, every=4)
    callback = lightning_callback(monitor)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, loader)
    assert [c.step for c in monitor.history] == [4, 8]
    assert "stability/lr_upper" in trainer.callback_metrics
    callback.load_state_dict(callback.state_dict())


def test_accelerate_needs_no_callback():
    accelerate = pytest.importorskip("accelerate")
    model, x, y = nn.Linear(4, 3), torch.randn(48, 4), torch.randint(0, 3, (48,))
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    monitor = StabilityMonitor(model, "cross_entropy", (x, y), batch_size=8, every=3).attach(optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
    assert [c.step for c in monitor.history] == [3, 6]

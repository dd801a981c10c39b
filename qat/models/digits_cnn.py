"""A small convolutional classifier of the digits, trained from nothing in seconds, its BatchNorms folded."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat.data.digits import Digits
from qat.errors import UserError
from qat.fold import fold_batchnorm
from qat.models.load import Loaded
from qat.models.sequential import describe


class DigitsCNN(nn.Sequential):
    """float32 [B, 1, 8, 8] -> logits [B, 10]; three 3 x 3 convolutions and two linear layers, 41k parameters."""

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64), hidden: int = 64) -> None:
        a, b, c = widths
        layers: list[tuple[str, nn.Module]] = []
        for i, (inputs, outputs) in enumerate([(1, a), (a, b), (b, c)], start=1):
            layers += [
                (f"conv{i}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)),
                (f"norm{i}", nn.BatchNorm2d(outputs)),
                (f"relu{i}", nn.ReLU()),
            ]
            if i > 1:
                layers.append((f"pool{i}", nn.MaxPool2d(2)))
        layers += [
            ("flatten", nn.Flatten()),
            ("hidden", nn.Linear(c * 4, hidden)),
            ("relu4", nn.ReLU()),
            ("head", nn.Linear(hidden, 10)),
        ]
        super().__init__(OrderedDict(layers))

    @property
    def config(self) -> dict[str, Any]:
        """What exporters build the graph from; BatchNorms must be folded."""
        return describe(self, (1, 8, 8), "digits_cnn")


@dataclass(kw_only=True)
class TrainedDigitsCNN:
    """`model=digits_cnn`: trains the float model on the data's training split, the same weights for the same seed."""

    seed: int
    epochs: int = 15
    lr: float = 4e-3
    _trained: dict[str, Tensor] | None = field(default=None, init=False, repr=False)

    def load(self, data: Digits) -> Loaded:
        """The folded model in eval mode. Training happens once; a second call returns the same weights."""
        if not isinstance(data, Digits):
            raise UserError(f"model=digits_cnn classifies digits, not {type(data).__name__}: use data=digits")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = DigitsCNN()
            if self._trained is None:
                threads = torch.get_num_threads()
                torch.set_num_threads(1)  # more only wait for each other on images of 8 x 8, and sum in another order
                try:
                    fit_float(model, data, epochs=self.epochs, lr=self.lr)
                finally:
                    torch.set_num_threads(threads)
                self._trained = model.state_dict()
        model.load_state_dict(self._trained)
        return Loaded(fold_batchnorm(model), None, "digits_cnn", None)


def fit_float(model: nn.Module, data: Digits, *, epochs: int, lr: float) -> None:
    """Train in place: AdamW under a one-cycle schedule, images shifted by up to a pixel each way."""
    images = data.images("train")
    x, labels = nn.functional.pad(images["x"], (1, 1, 1, 1)), images["labels"]
    steps = len(labels) // data.batch_size
    if steps == 0:
        raise UserError(f"data.batch_size={data.batch_size} is more than the {len(labels)} training images")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels))[: steps * data.batch_size].split(data.batch_size):
            down, right = torch.randint(0, 3, (2,)).tolist()
            loss = nn.functional.cross_entropy(model(x[batch, :, down : down + 8, right : right + 8]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

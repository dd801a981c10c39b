"""What every observer is: state updated by each batch of a stream, and the range it gives at the end."""

from abc import abstractmethod

from torch import Tensor, nn

from qat.scheme import QuantSpec


class Observer(nn.Module):
    """State lives in buffers, so that it survives save, load and resume. One range for the whole tensor."""

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take note of one batch x (any shape). The caller has checked that x is finite and not empty."""

    @abstractmethod
    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """(low, high), each a 0-d float32 tensor: the range that `spec`'s rule turns into a scale."""

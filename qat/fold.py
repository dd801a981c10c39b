"""Batch normalisation folded into the layer before it, as runtimes do: quantize the weights that will be shipped."""

from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from qat.errors import UserError

FUSE = {
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Fold, in place, every BatchNorm that follows a Conv2d or Linear in an nn.Sequential; returns the model in eval
    mode. The BatchNorm becomes an Identity, so names stay; the layer gets a bias.

    Uses the running statistics: fold after float training, before `prepare`. Raises UserError naming a BatchNorm that
    follows nothing it could be folded into.
    """
    model.eval()
    for module in model.modules():
        if not isinstance(module, nn.Sequential):
            continue
        children = list(module.named_children())
        for (before, layer), (after, norm) in pairwise(children):
            fuse = FUSE.get((type(layer), type(norm)))  # type: ignore[arg-type]
            if fuse is not None:
                setattr(module, before, fuse(layer, norm))  # type: ignore[arg-type]
                setattr(module, after, nn.Identity())
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"{name} ({type(module).__name__}) follows no Conv2d or Linear in a Sequential, so it cannot be "
                "folded; move it behind one, or remove it"
            )
    return model

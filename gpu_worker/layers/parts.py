"""Which checkpoint tensors make up a model's parameters: the one thing layers tell the loader.

A part is a view of a parameter into which a checkpoint tensor of the same shape is copied. Merged projections
have several parts; a layer split over ranks will hand out narrower views.
"""

from collections.abc import Iterator

from torch import Tensor, nn

Parts = dict[str, Tensor]


class Layer(nn.Module):
    """A layer with parameters of its own."""

    def parts(self) -> Parts:
        """Parts by checkpoint name, relative to the folder of names in which the layer lies."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Called once when all parts are filled in: the layer may bring them into a faster layout."""


def parts_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, view) of everything to be loaded.

    A layer at `a.b.c` that names its part `p.weight` stands for `a.b.p.weight`; one that names it `weight`,
    for `a.b.c.weight`.
    """
    for path, module in model.named_modules():
        if isinstance(module, Layer):
            folder = path.rpartition(".")[0]
            for name, view in module.parts().items():
                prefix = folder if "." in name else path
                yield f"{prefix}.{name}" if prefix else name, view

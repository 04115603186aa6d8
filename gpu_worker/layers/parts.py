"""What layers are here: objects that can be called, know their checkpoint tensors, and hold other layers.

Not torch modules: nothing here trains, and a module's call costs as much as a small operation. Layers are the
one thing that tells the loader what to load, so it needs no rules. A part is a view of a weight into which a
checkpoint tensor of the same shape is copied; merged projections have several. A layer split over ranks will
hand out narrower views.
"""

from collections.abc import Iterator

from torch import Tensor

Parts = dict[str, Tensor]


class Layer:
    """A layer, or a whole model. Layers in its attributes, and in lists there, are its children."""

    def parts(self) -> Parts:
        """Its own parts by checkpoint name.

        Names are relative to the layer's path (`weight`), or to its parent's (`q_proj.weight`) where they
        have a dot: what we merge is apart in checkpoints.
        """
        return {}

    def fix_rows(self) -> None:
        """Called once, before the first rows come: from now on their bits may not depend on their number."""

    def prepare(self) -> None:
        """Called once when all parts are filled in: the layer may bring them into a faster layout."""


def walk(layer: Layer, path: str = "") -> Iterator[tuple[str, Layer]]:
    """(path, layer) of the layer and all below it, in the order in which they were made."""
    yield path, layer
    for name, value in vars(layer).items():
        children = value if isinstance(value, list) else [value]
        for i, child in enumerate(children):
            if isinstance(child, Layer):
                below = f"{name}.{i}" if isinstance(value, list) else name
                yield from walk(child, f"{path}.{below}" if path else below)


def parts_of(model: Layer) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, view) of everything to be loaded."""
    for path, layer in walk(model):
        for name, view in layer.parts().items():
            folder = path.rpartition(".")[0] if "." in name else path
            yield f"{folder}.{name}" if folder else name, view

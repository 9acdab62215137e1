"""The seven models at their real widths, with as few layers as have one of each kind."""

from dataclasses import replace

import presets
from model import preset

SEVEN = [name for name in presets.names() if not presets.is_toy(name)]


def shallow(name):
    """An Arch of one layer of each kind, and one of the first kind again."""
    arch = preset(name)
    kinds = list(dict.fromkeys(arch.layers))
    return replace(arch, layers=(*kinds, kinds[0]))

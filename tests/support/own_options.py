"""What a user keeps beside a command: an operator, and options that name it."""

OPERATOR = """
from torch import nn


class Shift(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.mix = nn.Conv2d(conv.in_channels, conv.out_channels, 1, conv.stride)

    def forward(self, x):
        return self.mix(x.roll((1, 1), (2, 3)))

    @classmethod
    def from_layer(cls, layer, config, init, site):
        return cls(layer)
"""


def write_options(folder):
    """Write an operator and a grid of a user's own."""
    for name, text in {
        "operator/mine.yaml": "name: mine\nkind: conv\ntarget: my_shift.Shift\n",
        "grid/two.yaml": "# @package sweep\nname: two\naxes:\n  seed: [0, 1]\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

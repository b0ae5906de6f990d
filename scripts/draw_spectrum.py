"""Draw the README's picture: the neighbours of one pixel along the blend axis, chosen by the operator itself."""

from dataclasses import dataclass

from convnn.cli.program import run_program, script_options

USAGE = """
usage: uv run scripts/draw_spectrum.py [out=docs/spectrum.png] [k=9] [row=10] [column=33]

Draws which k tokens the pixel at (row, column) of a photograph selects at blend 0, 0.25, 0.5, 0.75 and 1.
{options}
The photograph is scikit-learn's flower.jpg (by dany13, CC BY 2.0), scaled down to 32 x 48; features are 3x3 patches.
"""


@dataclass
class Options:
    """Arguments of this script."""

    out: str = "docs/spectrum.png"
    """File."""
    k: int = 9
    """Neighbours to draw."""
    row: int = 10
    """Of the pixel that selects, among 32."""
    column: int = 33
    """Of the pixel that selects, among 48."""


def main(argv: list[str]) -> None:
    """Select and draw."""
    options: Options = script_options(Options, argv, USAGE)
    import matplotlib
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_sample_image

    from convnn.ops.geometry import Geometry
    from convnn.ops.selection import select_neighbors
    from convnn.ops.settings import Selection

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    photo = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None] / 255
    image = F.interpolate(photo, (32, 48), mode="bilinear", antialias=True)
    geometry = Geometry(32, 48, kernel=(3, 3), padding=(1, 1))
    patches = F.unfold(F.pad(image - image.mean((2, 3), keepdim=True), (2,) * 4), 3).mT[:, None]  # (1, 1, N, 27)
    queries = geometry.query_index()
    query = options.row * 48 + options.column

    blends = (0.0, 0.25, 0.5, 0.75, 1.0)
    figure, panels = plt.subplots(1, len(blends), figsize=(16, 2.6), layout="constrained")
    for panel, blend in zip(panels, blends, strict=True):
        chosen = select_neighbors(patches[:, :, queries], patches, geometry, Selection(k=options.k), blend=blend).index[
            0, 0, query
        ]
        rows, cols = (t - 1 for t in geometry.coordinates(chosen))  # without the ring
        panel.imshow(image[0].permute(1, 2, 0), interpolation="nearest")
        panel.scatter(cols[1:], rows[1:], s=36, marker="s", facecolors="none", edgecolors="white", linewidths=1.8)
        panel.scatter(cols[:1], rows[:1], s=44, marker="s", color="#0072b2", edgecolors="white")
        panel.set_xticks([])
        panel.set_yticks([])
        names = {0.0: "blend 0: convolution", 1.0: "blend 1: attention"}
        panel.set_title(names.get(blend, f"blend {blend:g}"), fontsize=13)
    figure.savefig(options.out, dpi=80)
    print(options.out)


if __name__ == "__main__":
    run_program(main)

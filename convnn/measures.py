"""What is measured of each layer at the end of an epoch (``convnn.diagnostics``). Imports no torch."""

MEASURES = {
    "overlap": "neighbours inside the convolution window",
    "distance_mean": "mean distance to a neighbour, as a share of the map's longer side",
    "distance_q10": "distance that a tenth of the neighbours stay below",
    "distance_q50": "median distance to a neighbour",
    "distance_q90": "distance that nine tenths of the neighbours stay below",
    "entropy": "entropy of the weights, 1: all neighbours weigh the same",
    "hub_skewness": "skewness of how often a token is chosen",
    "hub_share": "queries that choose the most chosen token",
    "padding": "neighbours that are padding",
    "prefix": "neighbours that are CLS or other prefix tokens",
    "agreement": "neighbours that the same query chose at the measurement before",
}
"""Shares lie in [0, 1]; null: not defined (``entropy`` of equal weights, the first ``agreement``)."""

SHOWN = {
    "blend": "blend\n(0: by position, 1: by features)",
    "overlap": "neighbours in the\nconvolution window",
    "distance_mean": "mean distance to a neighbour\n(share of the map's side)",
    "hub_share": "queries that choose\nthe most chosen token",
    "entropy": "evenness of the weights\n(entropy, 1: all equal)",
    "outside": "neighbours that are\npadding or CLS",
    "agreement": "neighbours kept since\nthe epoch before",
}
"""What the pictures show, and its title; ``outside`` is ``padding`` and ``prefix`` together."""

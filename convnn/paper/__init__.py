"""The tables of the ConvNN paper: published figures, counts, comparison."""

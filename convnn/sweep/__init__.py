"""From a grid to its points, each in a process of its own."""

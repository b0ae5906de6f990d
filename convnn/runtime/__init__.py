"""This process and its peers: device, signals, process groups, files."""

"""Train one model on the spectrum between convolution and attention; see README.md and ``--help``."""

from convnn.cli.train import main

if __name__ == "__main__":
    main()

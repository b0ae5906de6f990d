"""Look into the networks of finished runs: what they see, how they fail, along the spectrum; see ``--help``."""

from convnn.cli.analyze import main

if __name__ == "__main__":
    main()

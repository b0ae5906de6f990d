"""Tell the classes of image files by a finished run's model; see ``--help``."""

from convnn.cli.predict import main

if __name__ == "__main__":
    main()

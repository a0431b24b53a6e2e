"""``python -m fxfuse`` is the ``fxfuse`` command."""

from fxfuse.cli import main

if __name__ == "__main__":
    main()

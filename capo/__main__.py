"""``python -m capo``. Kept tiny: the engine's process start method imports it again."""

from capo.cli import main

if __name__ == "__main__":
    main()

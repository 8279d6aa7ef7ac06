"""`python -m dtem_hf` is `dtem-hf`."""

from .cli import main


if __name__ == "__main__":
    main()

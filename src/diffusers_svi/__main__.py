"""`python -m diffusers_svi` is `diffusers-svi`."""

from .cli import main


if __name__ == "__main__":
    main()

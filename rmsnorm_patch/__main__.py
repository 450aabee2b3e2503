"""`python -m rmsnorm_patch`: the same as `rmsnorm-patch`."""

from .cli import main

main()

"""`python -m deltaw`, for where the command `deltaw` is not on the path."""

from deltaw.cli import main

main()

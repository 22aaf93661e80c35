"""`python -m benchmarks.scaling`."""

from benchmarks.scaling.run import main

main()

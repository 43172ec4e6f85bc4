"""The questions that can be asked: python -m benchmarks."""

import benchmarks

print(benchmarks.__doc__.strip())

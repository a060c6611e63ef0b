"""Documents made of the benchmarks' result files."""

"""The files of benchmarks, in the layouts that people have, as questions."""

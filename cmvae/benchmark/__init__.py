"""How fast the parts are: jobs that are timed in processes of their own, in turns. See tools/benchmark.py."""

"""What the rows of a study say, in numbers: sums and aims, where two methods break even, what a change costs, how well
the methods' models predict.

Everything is computed from result files, which :mod:`benchmarks.study` writes; nothing is measured here. A method
always counts with its fastest configuration. :mod:`benchmarks.exhibits` shows it.
"""

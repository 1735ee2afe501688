"""`lowbit bench`: what 4-bit training costs and buys, measured against honest baselines on the user's own machine.

Reading order: `data` and `model` are the workload, `methods` says what is compared, `train` does one run, `runner` does
many, `summary` turns their results into comparisons, `report`, `plots` and `html` show them, `cli` is the command line.
"""

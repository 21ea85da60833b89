"""The simulator: the live engine's scheduler, with a cost model for a model and a virtual clock.

`run.simulate` is the loop; `cost.Roofline` says how long a step takes; `report.Report` is what live
benchmarks and simulations have in common.
"""

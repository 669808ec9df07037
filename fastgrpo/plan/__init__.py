"""What a run will need: bytes by part and phase, seconds by stage. Formulas, nothing is run; docs/plan.md has them.

`planner.plan_run` is the prediction, `fitting.Planning` the same with other options; `command.py` is `fastgrpo plan`.
"""

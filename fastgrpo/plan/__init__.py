"""What a run will need: bytes by part and phase, seconds by stage. Formulas, nothing is run; docs/plan.md has them."""

from fastgrpo.plan.planner import plan_run
from fastgrpo.plan.records import ModelBytes, Plan, Workload
from fastgrpo.plan.shapes import ModelShape, describe_shape

__all__ = ["ModelBytes", "ModelShape", "Plan", "Workload", "describe_shape", "plan_run"]

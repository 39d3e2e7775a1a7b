"""Plans: the whole life of a model in stages, its baselines, and what they cost."""

from tokenformer.plans.plan import ImagePlan, Plan, Stage
from tokenformer.plans.resolve import resolve
from tokenformer.plans.results import collect
from tokenformer.plans.runner import resolve_with_data, run_plan
from tokenformer.plans.task import ResolvedStage

__all__ = ["ImagePlan", "Plan", "ResolvedStage", "Stage", "collect", "resolve", "resolve_with_data", "run_plan"]

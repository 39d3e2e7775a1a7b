"""Plans: the whole life of a model in stages, its baselines, and what they cost."""

from tokenformer.plans.plan import Plan, Stage
from tokenformer.plans.resolve import ResolvedStage, resolve
from tokenformer.plans.results import collect
from tokenformer.plans.runner import resolve_with_data, run_plan

__all__ = ["Plan", "ResolvedStage", "Stage", "collect", "resolve", "resolve_with_data", "run_plan"]

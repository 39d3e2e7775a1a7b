"""Judging models: perplexity and bits per byte on held-out text."""

from tokenformer.evaluation.perplexity import evaluate_perplexity

__all__ = ["evaluate_perplexity"]

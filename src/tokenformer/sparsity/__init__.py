"""Sparse inference: every parameter token an expert, of which each input computes those that speak loudest."""

from tokenformer.models.cost import shares
from tokenformer.sparse import SparsePattention
from tokenformer.sparsity.sparsify import densify, sparsify, sparsify_folder
from tokenformer.sparsity.statistics import activation_statistics

__all__ = ["SparsePattention", "activation_statistics", "densify", "shares", "sparsify", "sparsify_folder"]

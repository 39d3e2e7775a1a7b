"""Models for people who do not have this package: folders for the Hub, and ONNX."""

from tokenformer.export.hub import export_hub
from tokenformer.export.onnx import export_onnx

__all__ = ["export_hub", "export_onnx"]

"""`tokenformer export-onnx MODEL OUT`."""

from tokenformer.cli.parser import Parser, call

_EXAMPLE = """\
  tokenformer export-onnx runs/large onnx/large
  tokenformer export-onnx runs/large onnx/large-half --dtype float16"""


def main(argv: list[str]) -> None:
    """Write an ONNX graph and print how far it is from torch."""
    from tokenformer.export.onnx import export_onnx

    summary = "Write an ONNX graph for prefill and decoding, checked against torch with ONNX Runtime."
    exported = call(export_onnx, Parser("export-onnx", summary, _EXAMPLE), argv)
    difference, largest = exported["difference"], exported["largest_logit"]
    print(f"exported: {exported['out']}   {exported['bytes'] / 1e6:,.1f} MB")
    print(f"files:    {', '.join(exported['files'])}")
    print(f"checked:  logits differ from torch's by at most {difference:.2g}, where the largest is {largest:.3g}")

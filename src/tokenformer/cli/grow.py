"""`tokenformer grow MODEL OUT --qkv N --output N --ffn N`."""

from tokenformer.cli.parser import Parser, call

_EXAMPLE = """\
  tokenformer grow runs/small runs/small-grown --qkv 512 --output 512 --ffn 2048
  tokenformer train recipes/language/small.yaml --model.path runs/small-grown --data.path data/books --out runs/large
  tokenformer grow runs/cifar10 runs/cifar10-grown --qkv 256 --output 256 --ffn 1024"""


def main(argv: list[str]) -> None:
    """Grow a model folder and print what it now is."""
    from tokenformer.growth import grow_folder
    from tokenformer.parallel.growth import grow_folder_in_parts
    from tokenformer.parallel.mesh import is_main_process, launched_processes

    parser = Parser("grow", "Append parameter tokens to a model; by default its outputs do not change.", _EXAMPLE)
    grown = call(grow_folder if launched_processes() == 1 else grow_folder_in_parts, parser, argv)
    if not is_main_process():
        return
    print(f"grown: {grown['out']}   segment '{grown['segment']}': {grown['before']:,} -> {grown['after']:,} parameters")
    data = "--data.train IMAGES" if grown["model_type"] == "tokenformer_vision" else "--data.path DATA"
    print(f"next:  tokenformer train RECIPE.yaml --model.path {grown['out']} {data} --out RUN")
    print(f"       tokenformer info {grown['out']}")

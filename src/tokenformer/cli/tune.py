"""`tokenformer tune MODEL OUT --data DATA --qkv N --output N --ffn N`."""

from tokenformer.cli.parser import Parser, add_signature

_EXAMPLE = """\
  tokenformer tune runs/small runs/small-law --data data/law --qkv 8 --output 8 --ffn 32 --name law
  tokenformer generate runs/small --adapter runs/small-law --prompt 'The party'
  tokenformer eval runs/small --adapter runs/small-law --perplexity data/law
  tokenformer tune runs/digits runs/digits-mine --data my-digits --qkv 4 --ffn 16 --epochs 20"""


def main(argv: list[str]) -> None:
    """Train an adapter, and say where it is and what can be done with it."""
    from tokenformer.tuning.training import tune

    parser = Parser("tune", "Add parameter tokens to a model and train them alone: an adapter of a few MB.", _EXAMPLE)
    add_signature(parser, tune, skip=("progress",))
    options = parser.parse_args(argv).as_dict()
    summary = tune(**options)
    model, out, data = options["model"], options["out"], options["data"]
    figure = (
        f"held-out perplexity {summary['eval_perplexity']:.2f}"
        if "eval_perplexity" in summary
        else f"held-out top-1 {summary['eval_top1']:.2%}"
    )
    print(f"adapter: {out}   {summary['adapter_parameters']:,} parameters   {figure}")
    if "eval_perplexity" in summary:
        print(f"next:  tokenformer generate {model} --adapter {out} --prompt 'Once'")
        print(f"       tokenformer eval {model} --adapter {out} --perplexity {data}")
        print(f"       tokenformer serve {model} --adapters {out}")
    else:
        print(f"next:  tokenformer eval {model} --adapter {out} --images {data}")

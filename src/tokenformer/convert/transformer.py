"""A pretrained Transformer to a TokenFormer that begins close to it (TokenFormer, section 3.2).

Embeddings and final norm are taken over as they are. `closed_form.py` says which tokens compute what a block does, and
where they are exact; `fitting.py` brings the rest close on text.
"""

from pathlib import Path
from typing import Any

import torch

from tokenformer.convert.calibration import mean_loss, read_rows, write_rows
from tokenformer.convert.closed_form import feedforward_tokens, linear_tokens
from tokenformer.convert.fitting import fit
from tokenformer.convert.pretrained import Pretrained, load_pretrained
from tokenformer.errors import UserError
from tokenformer.folders import new_folder
from tokenformer.models import TokenFormerConfig, TokenFormerForCausalLM
from tokenformer.models.loading import copy_tokenizer, model_folder, quiet
from tokenformer.ops import get_activation
from tokenformer.pattention import BASE

# What GPT-2 gets in place of its learned positions: the published share.
_ROTARY_PCT = 0.25


def from_transformer(
    model: str,
    out: str,
    *,
    qkv: int | None = None,
    output: int | None = None,
    ffn: int | None = None,
    calibration: str | None = None,
    calibration_tokens: int = 32768,
    rotary_pct: float | None = None,
) -> dict[str, Any]:
    """Initialise a TokenFormer from a pretrained GPT-NeoX, Pythia or GPT-2 and write it to a new folder.

    Args:
        model: folder of the Transformer, or its name on the Hub.
        out: folder to write; must not hold anything yet.
        qkv: parameter tokens of each query, key and value layer; as many as channels if not given, twice as many come
            closest.
        output: parameter tokens of each output projection; as many as channels if not given.
        ffn: parameter tokens of each feed-forward; as many as the Transformer's has neurons if not given.
        calibration: text file to fit the tokens on; text that the Transformer writes itself if not given.
        calibration_tokens: tokens of text to fit on; 0 fits nothing and uses the weights alone.
        rotary_pct: share of each head's channels that carries positions; the Transformer's own if not given, 0.25 for
            GPT-2, whose learned positions cannot be taken over.

    Returns:
        `out`, `architecture`, `tokens` of a layer by kind, the parameters `before` and `after`, and `calibration`: the
        `text` (a file, `own` or None), the `tokens` fitted on and, in nats per token on text that was not fitted on,
        the loss of the Transformer (`loss_before`) and of the TokenFormer (`loss_after`).

    Raises:
        UserError: another architecture, or options of it that a TokenFormer cannot express; weights that are missing or
            do not fit the configuration; no such calibration file, too little text in it, no tokenizer to read it
            with; counts that cannot be; a folder that is not empty. Nothing is written then.
    """
    if calibration_tokens < 0:
        raise UserError(f"calibration_tokens must not be negative, got {calibration_tokens}")
    if calibration is not None and calibration_tokens == 0:
        raise UserError("calibration_tokens is 0, which fits nothing: leave out calibration, or give more tokens")
    with new_folder(Path(out)) as partial, quiet():
        source = model_folder(model)
        pretrained = load_pretrained(source)
        channels, neurons = pretrained.embedding.shape[1], len(pretrained.blocks[0].inner.weight)
        counts = {
            "qkv": channels if qkv is None else qkv,
            "output": channels if output is None else output,
            "ffn": neurons if ffn is None else ffn,
        }
        if rotary_pct is None:
            rotary_pct = _ROTARY_PCT if pretrained.positions is not None else pretrained.rotary_pct
        rows = None
        if calibration is not None:
            rows = read_rows(Path(calibration), source, pretrained, calibration_tokens)
        converted = initialize(pretrained, counts, rotary_pct)
        if calibration_tokens and rows is None:
            rows = write_rows(pretrained, calibration_tokens)
        losses = {}
        if rows is not None:
            held_out = max(1, len(rows) // 8)
            fit(converted, pretrained, rows[:-held_out])
            losses = {
                "loss_before": mean_loss(pretrained.model, rows[-held_out:]),
                "loss_after": mean_loss(converted, rows[-held_out:]),
            }
        converted.save_pretrained(partial)
        copy_tokenizer(source, partial)
    return {
        "out": out,
        "architecture": pretrained.architecture,
        "tokens": counts,
        "before": pretrained.model.num_parameters(),
        "after": converted.num_parameters(),
        "calibration": {
            "text": None if rows is None else (calibration or "own"),
            "tokens": 0 if rows is None else rows[:-held_out].numel(),
            **losses,
        },
    }


@torch.no_grad()
def initialize(pretrained: Pretrained, counts: dict[str, int], rotary_pct: float) -> TokenFormerForCausalLM:
    """The TokenFormer of the closed form, in evaluation mode and in the precision of `pretrained`.

    Args:
        pretrained: the Transformer.
        counts: parameter tokens of a layer by kind (`qkv`, `output`, `ffn`).
        rotary_pct: share of each head's channels that carries positions.

    Raises:
        UserError: a count below 1, a share that cannot be.
    """
    config = TokenFormerConfig(
        vocab_size=len(pretrained.embedding),
        hidden_size=pretrained.embedding.shape[1],
        num_hidden_layers=len(pretrained.blocks),
        num_attention_heads=pretrained.num_heads,
        segments=[{"name": BASE, **counts}],
        rotary_pct=rotary_pct,
        rope_parameters={"rope_theta": pretrained.rope_theta},
        activation=pretrained.activation,
        layer_norm_eps=pretrained.eps,
        max_position_embeddings=pretrained.max_positions,
        tie_word_embeddings=pretrained.head is None,
        bos_token_id=pretrained.model.config.bos_token_id,
        eos_token_id=pretrained.model.config.eos_token_id,
    )
    torch.manual_seed(0)  # tokens that the closed form has no use for begin with random values
    model = TokenFormerForCausalLM(config).eval()
    torch.nn.Module.to(model, pretrained.embedding.dtype)  # transformers' own `to` has lost its types
    embedding = pretrained.embedding
    if pretrained.positions is not None:
        # What all positions share can stay: as the output embedding it adds one number to all logits.
        embedding = embedding + pretrained.positions.mean(0)
    model.model.embed_tokens.weight.copy_(embedding)
    if pretrained.head is not None:
        model.lm_head.weight.copy_(pretrained.head)
    model.model.norm.weight.copy_(pretrained.norm[0])
    model.model.norm.bias.copy_(pretrained.norm[1])
    activation = get_activation(config.activation)
    for block, layer in zip(pretrained.blocks, model.model.layers, strict=True):
        attention = layer.attention
        for name in ("query", "key", "value"):
            tokens = linear_tokens(getattr(block, name), counts["qkv"], activation, input_norm=config.hidden_size**0.5)
            tokens.write(getattr(attention, name))
        # That of a single value, for directions that are all alike; attention mixes several.
        typical = (block.value.weight.square().sum() + block.value.bias.square().sum()).sqrt().item()
        linear_tokens(block.output, counts["output"], activation, input_norm=typical).write(attention.output)
        feedforward_tokens(block.inner, block.outer, counts["ffn"]).write(layer.ffn)
    return model

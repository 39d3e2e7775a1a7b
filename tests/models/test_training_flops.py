"""Training FLOPs by the paper's Table 3 against what torch counts in a forward and a backward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedConfig

from tokenformer import TokenFormerConfig, grow
from tokenformer.models.cost import training_flops_per_token


def _tokenformer(width: int, layers: int, qkv: int, output: int, ffn: int, length: int) -> TokenFormerConfig:
    return TokenFormerConfig(
        vocab_size=320,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        segments=[{"name": "base", "qkv": qkv, "output": output, "ffn": ffn}],
        max_position_embeddings=length,
    )


def _transformer(width: int, layers: int, ffn: int, length: int, *, tied: bool = True) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=320,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=ffn,
        max_position_embeddings=length,
        tie_word_embeddings=tied,
    )


def _counted(model: torch.nn.Module, length: int) -> float:
    """FLOPs per token that torch counts; with eager attention, as the CPU's fused kernel is counted as nothing."""
    model.set_attn_implementation("eager")
    ids = torch.randint(320, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops() / ids.numel()


CASES = {
    "tokenformer": (_tokenformer(64, 3, 48, 56, 192, 32), 32),
    "tokenformer, long rows": (_tokenformer(64, 3, 48, 56, 192, 256), 256),
    "tokenformer, wide": (_tokenformer(256, 2, 64, 64, 300, 64), 64),
    "tokenformer, many tokens": (_tokenformer(32, 2, 400, 200, 1600, 64), 64),
    "transformer": (_transformer(64, 3, 256, 32), 32),
    "transformer, long rows": (_transformer(64, 3, 256, 256), 256),
    "transformer, wide": (_transformer(256, 2, 700, 64), 64),
    "transformer, two embeddings": (_transformer(64, 3, 256, 32, tied=False), 32),
}


@pytest.mark.parametrize(("config", "length"), CASES.values(), ids=CASES)
def test_flops_are_those_that_torch_counts_to_the_last(config: PreTrainedConfig, length: int) -> None:
    model = AutoModelForCausalLM.from_config(config)
    assert training_flops_per_token(model, length) == _counted(model, length)


def test_flops_of_a_grown_model_count_every_segment() -> None:
    model = AutoModelForCausalLM.from_config(_tokenformer(64, 2, 48, 56, 192, 96))
    before = training_flops_per_token(model, 96)
    grow(model, qkv=100, output=80, ffn=512)
    grow(model, ffn=600)
    assert training_flops_per_token(model, 96) == model.training_flops_per_token(96) == _counted(model, 96)
    # Table 3: growing adds 6 for each new parameter, and nothing to the token-token attention.
    added = 2 * 2 * 64 * (3 * (100 - 48) + (80 - 56) + (600 - 192))
    assert training_flops_per_token(model, 96) - before == 6 * added


def test_a_wider_transformer_pays_for_its_sequence_and_a_grown_model_does_not() -> None:
    def slope(config: PreTrainedConfig) -> int:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return training_flops_per_token(model, 2048) - training_flops_per_token(model, 1024)

    small, large = _tokenformer(64, 3, 48, 48, 192, 2048), _tokenformer(64, 3, 480, 480, 1920, 2048)
    assert slope(small) == slope(large) == 3 * 4 * 3 * 64 * 1024  # three passes, 4 L D for each position more
    assert slope(_transformer(128, 3, 512, 2048)) == 2 * slope(_transformer(64, 3, 256, 2048))

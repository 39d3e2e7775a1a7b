"""Adapters of tokens through PEFT: the same function and the same files as ours, and PEFT's own ways to use them."""

import subprocess
import sys
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import PeftType
from transformers import Trainer, TrainingArguments
from with_adapters import add_lively

from statement import pattention
from tiny import tiny_ids, tiny_model
from tokenformer import Pattention, TokenFormerForCausalLM, UserError
from tokenformer.tuning import (
    AdapterCheckpoints,
    TokensConfig,
    add_adapter,
    list_adapters,
    load_adapter,
    save_adapter,
)

IDS = tiny_ids()
COUNTS = {"qkv": 3, "output": 2, "ffn": 5}


@pytest.fixture(autouse=True)
def _quiet():
    """PEFT reads an attribute that transformers is about to remove."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def _lively(model, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return model


@pytest.fixture
def saved(tmp_path):
    """Folders of a base and of an adapter that PEFT trained and saved, and the logits of both."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    adapted = _lively(get_peft_model(model, TokensConfig(**COUNTS)))
    adapted.save_pretrained(tmp_path / "law")
    return tmp_path / "base", tmp_path / "law", adapted(IDS).logits


def _base(saved) -> TokenFormerForCausalLM:
    return TokenFormerForCausalLM.from_pretrained(saved[0]).eval()


def test_outputs_stay_and_the_tokens_alone_are_trained() -> None:
    model = tiny_model()
    before, names = model(IDS).logits, {name for name, _ in model.named_parameters()}
    adapted = get_peft_model(model, TokensConfig(**COUNTS))
    assert torch.equal(adapted(IDS).logits, before)
    trained = [p for _, p in adapted.named_parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * 2 * 32 * (3 * 3 + 2 + 5)
    assert len(names) + len(trained) == len(list(adapted.parameters()))
    _lively(adapted)
    assert not torch.allclose(adapted(IDS).logits, before, atol=1e-2)
    with adapted.disable_adapter():
        assert torch.equal(adapted(IDS).logits, before)


def test_a_wrapped_layer_is_the_equation_over_both_segments() -> None:
    holder = torch.nn.Sequential(Pattention(7, 5, 6, dtype=torch.float64))
    adapted = _lively(get_peft_model(holder, TokensConfig(tokens=4)))
    base, new = holder[0].base_layer, holder[0].tokens_adapter["default"].double()
    x = torch.randn(3, 7, dtype=torch.float64)
    old = base.segments["base"]
    expected = pattention(x, [old.key, new.key], [old.value, new.value], float(base.scale))
    torch.testing.assert_close(adapted(x), expected, rtol=1e-10, atol=1e-10)


def test_peft_reads_what_it_wrote_and_what_we_wrote_and_we_read_both(saved, tmp_path) -> None:
    assert torch.equal(PeftModel.from_pretrained(_base(saved), saved[1])(IDS).logits, saved[2])
    ours = _base(saved)
    assert load_adapter(ours, saved[1]) == "law"
    assert torch.equal(ours(IDS).logits, saved[2])
    save_adapter(ours, "law", tmp_path / "ours")
    theirs = PeftModel.from_pretrained(_base(saved), tmp_path / "ours")
    assert torch.equal(theirs(IDS).logits, saved[2])
    through_transformers = _base(saved)
    through_transformers.load_adapter(str(tmp_path / "ours"))
    assert torch.equal(through_transformers(IDS).logits, saved[2])


def test_several_adapters_are_switched_and_deleted(saved) -> None:
    model = PeftModel.from_pretrained(_base(saved), saved[1])
    model.add_adapter("other", TokensConfig(ffn=4))
    model.set_adapter("other")
    assert torch.equal(model(IDS).logits, _base(saved)(IDS).logits), "zero keys"
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, saved[2])
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]


def test_merging_gives_an_ordinary_model(saved, tmp_path) -> None:
    model = PeftModel.from_pretrained(_base(saved), saved[1], adapter_name="law")
    model.merge_adapter()
    assert torch.equal(model(IDS).logits, saved[2])
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, _base(saved)(IDS).logits)
    merged = model.merge_and_unload()
    assert isinstance(merged, TokenFormerForCausalLM)
    assert merged.config.segments[1] == {"name": "law", **COUNTS}
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(TokenFormerForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits, saved[2])


def test_unloading_gives_the_base_back(saved) -> None:
    unloaded = PeftModel.from_pretrained(_base(saved), saved[1]).unload()
    assert torch.equal(unloaded(IDS).logits, _base(saved)(IDS).logits)
    assert [name for name, _ in unloaded.named_parameters()] == [name for name, _ in _base(saved).named_parameters()]


def test_another_base_and_impossible_counts_are_refused(saved) -> None:
    with pytest.raises(UserError, match="the adapter was made for another model"):
        PeftModel.from_pretrained(tiny_model(), saved[1])
    with pytest.raises(UserError, match="give the number of new tokens"):
        TokensConfig()
    with pytest.raises(UserError, match="tokens=2: the model has no layers of that kind"):
        get_peft_model(tiny_model(), TokensConfig(tokens=2))
    with pytest.raises(UserError, match="no Pattention layers"):
        get_peft_model(torch.nn.Linear(2, 2), TokensConfig(ffn=2))


def test_peft_itself_is_left_as_it_is() -> None:
    assert "TOKENS" not in list(PeftType)
    code = (
        "from peft import PeftConfig, PEFT_TYPE_TO_CONFIG_MAPPING as known; assert 'TOKENS' not in known\n"
        "import tokenformer.tuning.peft_method as ours; assert known['TOKENS'] is ours.TokensConfig"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# transformers' Trainer


def _trainer(model, folder, *, steps: int, callbacks=()) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tiny_ids(8)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))


def _tuned(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_trainer_with_the_callback_resumes_bitwise(tmp_path) -> None:
    torch.manual_seed(3)
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")

    def run(steps: int, resume: bool = False):
        model = TokenFormerForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(4)
        add_adapter(model, "law", **COUNTS)
        trainer = _trainer(model, tmp_path / "run", steps=steps, callbacks=[AdapterCheckpoints()])
        trainer.train(resume_from_checkpoint=resume)
        return model

    run(2)
    resumed = _tuned(run(4, resume=True))
    straight = _tuned(run(4))
    assert all(tensor.abs().max() > 0 for tensor in straight.values())
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_the_callback_refuses_a_checkpoint_without_adapters(tmp_path) -> None:
    model = tiny_model()
    _trainer(model, tmp_path, steps=2).train()
    add_lively(model, "law")
    with pytest.raises((UserError, ValueError)):
        _trainer(model, tmp_path, steps=4, callbacks=[AdapterCheckpoints()]).train(resume_from_checkpoint=True)
    assert [adapter.name for adapter in list_adapters(model)] == ["law"]

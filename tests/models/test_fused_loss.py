"""The loss without logits: its value and gradients against float64, what it leaves out, when it steps aside."""

import math

import pytest
import torch
from torch import nn

import statement
from tiny import tiny_ids, tiny_model
from tokenformer import TokenFormerForCausalLM
from tokenformer.modules import OutputEmbedding


def _fused(**fields) -> TokenFormerForCausalLM:
    model = tiny_model(**fields).train()
    model.fused_loss = True
    return model


def _labels(ids: torch.Tensor, ignored: int = -100) -> torch.Tensor:
    labels = ids.clone()
    labels[0, 3:6] = ignored
    return labels


def _exact_loss(logits: torch.Tensor, labels: torch.Tensor, divisor: int | None = None) -> torch.Tensor:
    """The mean over the positions that count of -log p(next), term by term."""
    terms = [
        logits[row, t].logsumexp(0) - logits[row, t, labels[row, t + 1]]
        for row in range(labels.shape[0])
        for t in range(labels.shape[1] - 1)
        if labels[row, t + 1] >= 0
    ]
    return torch.stack(terms).sum() / (divisor or len(terms))


def _gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("length", [2, 9, 61])
def test_loss_and_gradients_are_those_of_the_logits(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr("tokenformer.models.loss._LOGITS", 31 * 16)  # several chunks, the last one smaller
    model, ids = _fused().double(), tiny_ids(length=length)
    labels = _labels(ids)
    expected = _exact_loss(model.eval()(ids).logits, labels)
    wanted = _gradients(model, expected)
    output = model.train()(ids, labels=labels)
    assert output.logits is None
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, gradient in _gradients(model, output.loss).items():
        assert statement.error(gradient, wanted[name]) < 1e-10


# In float32 on a CPU also under autocast, but what comes before the loss is in bfloat16.
@pytest.mark.parametrize("autocast", [False, True])
def test_single_precision_and_autocast(autocast: bool) -> None:
    model, ids = _fused(), tiny_ids(length=33)
    exact = tiny_model().double()
    exact.load_state_dict(model.state_dict())
    expected = _exact_loss(exact(ids).logits, ids)
    wanted = _gradients(exact, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(ids, labels=ids).loss
    assert loss.dtype == torch.float32
    tolerance = statement.TOLERANCE[torch.bfloat16 if autocast else torch.float32]
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for name, gradient in _gradients(model, loss).items():
        assert gradient.dtype == torch.float32
        assert statement.error(gradient, wanted[name]) < tolerance


def test_products_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator does under autocast."""
    monkeypatch.setattr("tokenformer.models.loss._dtype_of_products", lambda hidden: torch.bfloat16)
    model, ids = _fused(), tiny_ids(length=33)
    exact = tiny_model().double()
    exact.load_state_dict(model.state_dict())
    expected = _exact_loss(exact(ids).logits, ids)
    wanted = _gradients(exact, expected)
    loss = model(ids, labels=ids).loss
    # Each position's loss is rounded, their sum is not.
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=4e-3)
    for name, gradient in _gradients(model, loss).items():
        assert statement.error(gradient, wanted[name]) < statement.TOLERANCE[torch.bfloat16]


def test_arguments_of_the_loss_function() -> None:
    model, ids = _fused().double(), tiny_ids()
    logits = model.eval()(ids).logits.detach()
    model.train()
    # The Trainer divides the sum by the items of all accumulated batches.
    loss = model(ids, labels=_labels(ids), num_items_in_batch=torch.tensor(40)).loss
    assert loss.item() == pytest.approx(_exact_loss(logits, _labels(ids), 40).item(), rel=1e-12)
    loss = model(ids, labels=_labels(ids, -1), ignore_index=-1).loss
    assert loss.item() == pytest.approx(_exact_loss(logits, _labels(ids)).item(), rel=1e-12)
    # Labels that a caller has shifted: here each position predicts itself.
    loss = model(ids, labels=ids, shift_labels=ids).loss
    itself = -logits.log_softmax(-1).gather(-1, ids[..., None]).mean().item()
    assert loss.item() == pytest.approx(itself, rel=1e-12)


def test_labels_that_do_not_count() -> None:
    model, ids = _fused(), tiny_ids()
    nothing = torch.full_like(ids, -100)
    assert math.isnan(model(ids, labels=nothing).loss.item())  # the mean of nothing, as with logits
    assert model(ids, labels=nothing, num_items_in_batch=5).loss.item() == 0


def test_memory_stays_below_that_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenformer.models.loss._LOGITS", 2**17)
    fields = {"vocab_size": 2048, "max_position_embeddings": 128}
    ids = torch.randint(2048, (4, 128))
    largest = {}
    for fused in (False, True):
        model = tiny_model(**fields).train()
        model.fused_loss = fused
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(ids, labels=ids).loss.backward()
        largest[fused] = max(event.self_cpu_memory_usage for event in profile.events())
    logits = ids.numel() * 2048 * 4
    assert largest[False] >= logits
    assert largest[True] < logits / 4


def test_logits_come_back_in_evaluation_and_unless_asked_for() -> None:
    model, ids = _fused(), tiny_ids()
    loss = model(ids, labels=ids).loss.item()
    evaluated = model.eval()(ids, labels=ids)
    assert evaluated.logits.shape == (*ids.shape, 31)
    assert evaluated.loss.item() == pytest.approx(loss, rel=1e-6)
    assert model.train()(ids).logits is not None
    assert not TokenFormerForCausalLM(model.config).fused_loss


def test_a_head_that_is_another_is_called() -> None:
    class Adapted(OutputEmbedding):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model, ids = _fused(), tiny_ids()
    head = Adapted(32, 31, bias=False)
    head.weight = model.lm_head.weight
    plain = model.eval()(ids).logits.detach().double()
    model.lm_head = head
    output = model.train()(ids, labels=ids)
    assert output.logits is not None
    assert output.loss.item() == pytest.approx(_exact_loss(2 * plain, ids).item(), rel=1e-5)


@pytest.mark.filterwarnings("error:.*allow_retain_graph")
def test_compiles_without_a_break() -> None:
    model, ids = _fused(), tiny_ids()
    expected = model(ids, labels=ids, use_cache=False).loss
    wanted = _gradients(model, expected)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(ids, labels=ids, use_cache=False).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in _gradients(model, loss).items():
        assert statement.error(gradient, wanted[name]) < 1e-5

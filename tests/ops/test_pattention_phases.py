"""The two phases, totals known otherwise (Gram identity), and tokens that are invisible to an input."""

import pytest
import torch

import statement
from tokenformer import ops

normalizations = pytest.mark.parametrize("normalization", ["l2_gelu", "gelu_l2", "gelu_l1", "softmax"])
backends = pytest.mark.parametrize("backend", ["fused", "reference"])


def _draw(leading=(3, 4), channels=6, out=5, tokens=(7, 4), dtype=torch.float64):
    x = torch.randn(*leading, channels, dtype=dtype)
    return (
        x,
        [torch.randn(n, channels, dtype=dtype) for n in tokens],
        [torch.randn(n, out, dtype=dtype) for n in tokens],
    )


# Phases


@pytest.mark.parametrize("tokens", [(5,), (7, 4), (1, 6, 2)], ids=str)
@normalizations
def test_segments_evaluated_apart_add_up_to_the_whole(normalization, tokens) -> None:
    x, keys, values = _draw(tokens=tokens)
    phases = [ops.segment_activities(x, key, normalization=normalization) for key in keys]
    total = ops.get_normalization(normalization).combine([statistic for _, statistic in phases])
    shares = [
        ops.segment_output(activities, value, 1.7, total, normalization=normalization)
        for (activities, _), value in zip(phases, values, strict=True)
    ]
    assert statement.error(sum(shares), statement.pattention(x, keys, values, 1.7, normalization)) < 1e-10


@normalizations
def test_the_statistic_is_what_its_name_says(normalization) -> None:
    x, keys, _ = _draw(dtype=torch.float32)
    _, statistic = ops.segment_activities(x.bfloat16(), keys[0].bfloat16(), normalization=normalization)
    scores = (x.bfloat16() @ keys[0].bfloat16().T).double()
    expected = {
        "l2_gelu": lambda: scores.pow(2).sum(-1, keepdim=True),
        "gelu_l2": lambda: statement.gelu(scores).pow(2).sum(-1, keepdim=True),
        "gelu_l1": lambda: statement.gelu(scores).abs().sum(-1, keepdim=True),
        "softmax": lambda: scores.exp().sum(-1, keepdim=True).log(),
    }[normalization]()
    assert statistic.dtype == torch.float32
    torch.testing.assert_close(statistic.double(), expected, rtol=2e-2, atol=2e-2)


@normalizations
def test_a_subset_with_the_total_of_the_whole_is_its_share(normalization) -> None:
    x, keys, values = _draw()
    whole = torch.cat(keys)
    kind = ops.get_normalization(normalization)
    total = kind.combine([ops.segment_activities(x, key, normalization=normalization)[1] for key in keys])
    subset = torch.tensor([0, 3, 8])
    share = ops.pattention(
        x, whole[subset], torch.cat(values)[subset], 1.7, normalization=normalization, total=total, backend="fused"
    )
    weights = statement.weights(x, keys, 1.7, normalization)[..., subset]
    assert statement.error(share, weights @ torch.cat(values)[subset]) < 1e-10


# Gram identity


@pytest.mark.parametrize(
    ("channels", "tokens"),
    [
        pytest.param(8, (40,), id="full-rank"),
        pytest.param(16, (5,), id="rank-deficient"),
        pytest.param(12, (7, 3), id="rank-deficient-segments"),
        pytest.param(8, (20, 30, 10), id="segments"),
        pytest.param(6, (1,), id="one-token"),
    ],
)
def test_a_subset_by_the_gram_identity_is_its_share(channels, tokens) -> None:
    x, keys, values = _draw((50,), channels, 5, tokens, torch.float32)
    factor = ops.gram_factor(sum(ops.gram_matrix(key) for key in keys))
    total = ops.sum_of_squares(x, factor)
    subset = torch.arange(0, sum(tokens), 2)
    share = ops.pattention(x, torch.cat(keys)[subset], torch.cat(values)[subset], 1.7, total=total)

    exact = statement.weights(x.double(), [key.double() for key in keys], 1.7, "l2_gelu")[..., subset]
    expected = exact @ torch.cat(values)[subset].double()
    # Fewer tokens than channels: a row nearly orthogonal to all keys has a norm that is itself ill-conditioned.
    well = (x.double() @ torch.cat(keys).double().T).norm(dim=-1) > 0.1 * x.double().norm(dim=-1)
    assert well.sum() > 40
    assert statement.error(share[well], expected[well]) < 2e-6


def test_gram_factor_of_a_singular_matrix_reproduces_it() -> None:
    key = torch.randn(3, 8)
    gram = ops.gram_matrix(key)
    torch.testing.assert_close(gram, key.double().T @ key.double(), rtol=1e-12, atol=1e-12)
    factor = ops.gram_factor(gram, dtype=torch.float64)
    torch.testing.assert_close(factor @ factor.T, gram, rtol=1e-10, atol=1e-10)
    assert ops.gram_factor(gram).dtype == torch.float32


def test_gram_of_a_trained_key_takes_no_gradient() -> None:
    assert not ops.gram_matrix(torch.randn(3, 4, requires_grad=True)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sum_of_squares_is_that_of_the_scores(dtype) -> None:
    x, keys, _ = _draw((9,), 6, 2, (15,), torch.float32)
    x = x.to(dtype)
    total = ops.sum_of_squares(x, ops.gram_factor(ops.gram_matrix(keys[0])))
    assert total.dtype == torch.float32
    expected = (x.double() @ keys[0].double().T).pow(2).sum(-1, keepdim=True)
    torch.testing.assert_close(total.double(), expected, rtol=4e-6, atol=0)


# Visibility


def _gradients(output, leaves):
    return torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)


@pytest.mark.parametrize("activation", ["gelu", "sigmoid"])
@normalizations
@backends
def test_hidden_tokens_are_as_if_deleted(backend, normalization, activation) -> None:
    """Also where f(0) is not 0: a token whose score counts as 0 would otherwise still speak."""
    x, keys, values = _draw()
    leaves = [tensor.requires_grad_() for tensor in (x, *keys, *values)]
    visible = [torch.rand(len(key)) > 0.4 for key in keys]
    assert not all(mask.all() for mask in visible)
    output = ops.pattention(
        x, keys, values, 1.7, normalization=normalization, activation=activation, visible=visible, backend=backend
    )
    function = torch.sigmoid if activation == "sigmoid" else statement.gelu
    expected = statement.pattention(
        x,
        [key[mask] for key, mask in zip(keys, visible, strict=True)],
        [value[mask] for value, mask in zip(values, visible, strict=True)],
        1.7,
        normalization,
        function,
    )
    assert statement.error(output, expected) < 1e-10
    for gradient, wanted in zip(_gradients(output, leaves), _gradients(expected, leaves), strict=True):
        assert statement.error(gradient, wanted) < 1e-9


@normalizations
@backends
def test_masks_may_differ_by_row(backend, normalization) -> None:
    x, keys, values = _draw(leading=(2, 3), tokens=(8,))
    visible = torch.rand(2, 3, 8) > 0.4
    output = ops.pattention(x, keys[0], values[0], 1.7, normalization=normalization, visible=visible, backend=backend)
    for row in range(2):
        for column in range(3):
            mask = visible[row, column]
            expected = statement.pattention(x[row, column], [keys[0][mask]], [values[0][mask]], 1.7, normalization)
            assert statement.error(output[row, column], expected) < 1e-10


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 1, 8), (2, 3, 1), (1, 1, 1)], ids=str)
@backends
def test_masks_broadcast(backend, shape) -> None:
    x, keys, values = _draw(leading=(2, 3), tokens=(8, 2))
    visible = torch.rand(shape) > 0.4
    output = ops.pattention(x, keys, values, 1.7, visible=[visible, None], backend=backend)
    full = visible.expand(2, 3, 8)
    for row in range(2):
        for column in range(3):
            mask = torch.cat([full[row, column], torch.ones(2, dtype=torch.bool)])
            expected = statement.pattention(x[row, column], [torch.cat(keys)[mask]], [torch.cat(values)[mask]], 1.7)
            assert statement.error(output[row, column], expected) < 1e-10


@pytest.mark.parametrize("activation", ["gelu", "sigmoid"])
@normalizations
@backends
def test_a_row_that_sees_nothing_gives_zero_and_finite_gradients(backend, normalization, activation) -> None:
    x, keys, values = _draw(leading=(3,), dtype=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (x, *keys, *values)]
    visible = [torch.ones(3, 1, dtype=torch.bool).expand(3, len(key)).clone() for key in keys]
    for mask in visible:
        mask[1] = False
    output = ops.pattention(
        x, keys, values, 1.7, normalization=normalization, activation=activation, visible=visible, backend=backend
    )
    assert output[1].abs().max() == 0
    gradients = _gradients(output, leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0][1].abs().max() == 0
    # and the gradients of the other rows are what they are without it
    seeing = torch.tensor([0, 2])
    alone = _gradients(
        ops.pattention(x[seeing], keys, values, 1.7, normalization=normalization, activation=activation), leaves
    )
    for gradient, wanted in zip(gradients, alone, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@normalizations
def test_a_row_that_sees_nothing_gives_zero_without_the_mask_in_phase_two(normalization) -> None:
    """The activities of phase one say it already, where f(0) = 0."""
    x, keys, values = _draw(leading=(3,), dtype=torch.float32)
    hidden = torch.zeros(7, dtype=torch.bool)
    activities, statistic = ops.segment_activities(x, keys[0], normalization=normalization, visible=hidden)
    output = ops.segment_output(activities, values[0], 1.7, statistic, normalization=normalization)
    assert torch.equal(output, torch.zeros(3, 5))

"""The model driven as vLLM's transformers backend drives it (as of vLLM 0.33, and with the call of older versions).

vLLM builds the backbone from its configuration with parameters on the meta device, swaps embedding and final norm for
its own, fills parameters and buffers by name, and then feeds one flat row of tokens that belong to several requests.
Which of them see each other only its attention knows: a function that it registers with transformers, with a cache in
blocks of its own. Here that engine is written out small, and each request must get what the model gives it alone.
"""

import ast
import inspect
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saved_model import save_model
from tiny import tiny_model
from tokenformer import TokenFormerForCausalLM, TokenFormerModel
from tokenformer.export import export_hub
from tokenformer.modules import TokenFormerAttention

BLOCK, NUM_BLOCKS = 4, 32


@dataclass
class Request:
    """A sequence being served: its ids so far, how many of them are in the cache, and the blocks that hold them."""

    ids: list[int]
    done: int = 0
    blocks: list[int] = field(default_factory=list)

    def slots(self, end: int) -> torch.Tensor:
        """Where positions 0 to `end` lie in the cache."""
        return torch.tensor([self.blocks[position // BLOCK] * BLOCK + position % BLOCK for position in range(end)])


class PagedAttention(nn.Module):
    """Attention of one layer over its part of the cache; takes and gives (tokens, H * E), as vLLM's does."""

    def __init__(self, engine: "Engine", heads: int, head_size: int, scale: float) -> None:
        super().__init__()
        self.batch = engine.batch
        self.heads, self.head_size, self.scale = heads, head_size, scale
        # What is in the cache before it is written belongs to nobody: NaN shows a read of it.
        self.keys = torch.full((NUM_BLOCKS * BLOCK, heads, head_size), torch.nan)
        self.values = self.keys.clone()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (x.view(-1, self.heads, self.head_size) for x in (query, key, value))
        outputs, start = [], 0
        for request, count in self.batch:
            rows, end = slice(start, start + count), request.done + count
            slots = request.slots(end)
            self.keys[slots[request.done :]], self.values[slots[request.done :]] = (
                key[rows].float(),
                value[rows].float(),
            )
            scores = torch.einsum("qhe,khe->hqk", query[rows].float(), self.keys[slots]) * self.scale
            future = torch.arange(end) > torch.arange(request.done, end)[:, None]
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hqk,khe->qhe", weights, self.values[slots]))
            start += count
        assert start == len(query)
        return torch.cat(outputs).flatten(1).to(query.dtype)


def attention_of_vllm(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    attention_instances: dict[int, PagedAttention] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What vLLM registers. Older versions are handed their layers by the model, newer ones find them on the module."""
    assert attention_mask is None
    attention = module.vllm_attn if attention_instances is None else attention_instances[module.layer_idx]
    tokens = query.shape[-2]
    query, key, value = (x.transpose(1, 2).reshape(tokens, -1) for x in (query, key, value))
    return attention(query, key, value), None


class Norm(nn.Module):
    """In place of the final norm: not an nn.LayerNorm."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Embedding(nn.Module):
    """In place of the embedding: not an nn.Embedding."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, self.weight)


class Engine:
    """Builds the model of a folder, loads it, and runs batches."""

    def __init__(self, folder: Path, cls: Any, dtype: torch.dtype, *, attached: bool, embeds: bool) -> None:
        self.batch: list[tuple[Request, int]] = []
        self.embeds = embeds
        self.free = list(range(NUM_BLOCKS))[::-1]
        assert cls.is_backend_compatible()
        config = cls.config_class.from_pretrained(folder)
        config._attn_implementation = "vllm"
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with init_empty_weights(include_buffers=False):
                self.model = cls._from_config(config, dtype=dtype)
        finally:
            torch.set_default_dtype(default)
        assert self.model.get_decoder() is self.model
        self.model.set_input_embeddings(Embedding(self.model.get_input_embeddings()))
        self.model.norm = Norm(self.model.norm)
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu", dtype=dtype)))
        self.load(folder)
        layers = {
            module.layer_idx: module for module in self.model.modules() if type(module).__name__.endswith("Attention")
        }
        assert sorted(layers) == list(range(config.num_hidden_layers))
        instances = {
            index: PagedAttention(self, config.num_attention_heads, config.head_dim, module.scaling)
            for index, module in layers.items()
        }
        self.kwargs: dict[str, Any] = {} if attached else {"attention_instances": instances}
        if attached:
            for index, module in layers.items():
                module.vllm_attn = instances[index]

    def load(self, folder: Path) -> None:
        """Each stored tensor into the parameter or persistent buffer of its name, which must exist."""
        missing = {name for name, _ in self.model.named_parameters()}
        with safe_open(folder / "model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                path = name.removeprefix("model.")
                module = self.model.get_submodule(path.rpartition(".")[0])
                leaf = path.rpartition(".")[2]
                buffers = {k: v for k, v in module.named_buffers(recurse=False) if k in module.state_dict()}
                places = dict(module.named_parameters(recurse=False)) | buffers
                assert places[leaf].device.type == "cpu"
                places[leaf].data.copy_(file.get_tensor(name))
                missing.discard(path)
        assert not missing

    @torch.no_grad()
    def step(self, *batch: tuple[Request, int]) -> list[torch.Tensor]:
        """Run so many new tokens of each request, in one row; gives the logits of each request's last one."""
        ids, positions = [], []
        for request, count in batch:
            while len(request.blocks) * BLOCK < request.done + count:
                request.blocks.append(self.free.pop(0 if len(self.free) % 2 else -1))  # blocks lie scattered
            ids += request.ids[request.done : request.done + count]
            positions += range(request.done, request.done + count)
        self.batch[:] = batch
        inputs = torch.tensor([ids])
        embeddings = self.model.get_input_embeddings()
        outputs = self.model(
            input_ids=None if self.embeds else inputs,
            inputs_embeds=embeddings(inputs) if self.embeds else None,
            use_cache=False,
            position_ids=torch.tensor([positions]),
            return_dict=False,
            **self.kwargs,
        )
        hidden = outputs[0][0, ...]
        logits = nn.functional.linear(hidden, embeddings.weight)
        ends = torch.tensor([count for _, count in batch]).cumsum(0) - 1
        for request, count in batch:
            request.done += count
        return list(logits[ends])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenFormerForCausalLM, Path]:
    """A grown model with values in every token, and its exported folder."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vllm")
    model = save_model(path / "model", grown=True)
    for name, parameter in model.named_parameters():
        if ".grown1." in name:
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path / "model")
    export_hub(str(path / "model"), str(path / "hub"))
    return model, path / "hub"


@pytest.fixture(autouse=True)
def registered() -> Any:
    ALL_ATTENTION_FUNCTIONS.register("vllm", attention_of_vllm)
    yield
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop("vllm")


def _class(folder: Path, source: str) -> Any:
    if source == "exported":
        return get_class_from_dynamic_module("modeling_tokenformer.TokenFormerModel", folder)
    return TokenFormerModel


@pytest.mark.parametrize("source", ["installed", "exported"])
@pytest.mark.parametrize(("attached", "embeds"), [(True, False), (False, True)], ids=["attached", "handed"])
def test_requests_in_one_row_get_what_each_gets_alone(folders, source, attached, embeds) -> None:
    model, folder = folders
    engine = Engine(folder, _class(folder, source), torch.float32, attached=attached, embeds=embeds)
    a, b, c, d = (
        Request(list(ids)) for ids in ([5, 9, 2, 11, 3, 8, 1], [7, 7, 4], [30], [12, 6, 18, 2, 9, 9, 40, 3, 5])
    )

    def check(batch: list[tuple[Request, int]]) -> None:
        """Run a batch; a request whose prompt is through takes its likeliest next token."""
        for (request, _), logits in zip(batch, engine.step(*batch), strict=True):
            expected = model(torch.tensor([request.ids[: request.done]])).logits[0, -1]
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)
            if request.done == len(request.ids):
                request.ids.append(int(logits.argmax()))

    check([(a, 7), (b, 3)])  # two prompts
    check([(b, 1), (d, 4), (a, 1)])  # a step of each, and the first piece of a long prompt
    check([(d, 5), (c, 1), (a, 1), (b, 1)])  # its rest, and a prompt of one token
    for _ in range(3):
        check([(c, 1), (b, 1), (d, 1), (a, 1)])
    for request, length in ((a, 7), (b, 3), (c, 1), (d, 9)):
        prompt = torch.tensor([request.ids[:length]])
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(request.ids) - length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert generated[0].tolist() == request.ids


def test_in_bfloat16_the_scale_stays_float32(folders) -> None:
    model, folder = folders
    engine = Engine(folder, _class(folder, "installed"), torch.bfloat16, attached=True, embeds=False)
    scales = {name: buffer for name, buffer in engine.model.named_buffers() if name.endswith(".scale")}
    assert len(scales) == 10
    for name, scale in scales.items():
        assert scale.dtype == torch.float32
        assert torch.equal(scale, model.get_buffer(f"model.{name}"))
    request = Request([5, 9, 2, 11, 3, 8, 1])
    (logits,) = engine.step((request, 7))
    expected = model(torch.tensor([request.ids])).logits[0, -1]
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_vllm_finds_the_attention_call_in_the_source() -> None:
    """It reads the forward of each module: one call of what ALL_ATTENTION_FUNCTIONS gave, scaled by an attribute."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(TokenFormerAttention.forward)))
    lookups = [
        node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "ALL_ATTENTION_FUNCTIONS.get_interface"
    ]
    (name,) = [node.id for node in lookups if isinstance(node, ast.Name)]
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]
    assert [ast.unparse(word.value) for word in call.keywords if word.arg == "scaling"] == ["self.scaling"]
    assert isinstance(tiny_model().model.layers[0].attention.scaling, float)

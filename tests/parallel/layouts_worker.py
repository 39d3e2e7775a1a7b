"""What each process of test_layouts.py does: compare a model in parts with the whole one, and write down the errors."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tiny import tiny_ids, tiny_model
from tokenformer import Pattention, TokenFormerConfig, TokenFormerForCausalLM, grow
from tokenformer.parallel import Layout, Ranks, load_optimizer_shards, load_shards, save_shards, shard_model
from tokenformer.parallel.checkpoints import named_parameters_of, saved_tensors
from tokenformer.parallel.folders import write_model
from tokenformer.parallel.growth import grow_in_parts
from tokenformer.parallel.opening import lay_out, new_model, stored_model
from tokenformer.parallel.sharding import clip_gradients, groups_by_mesh

LAYOUTS = {
    2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)],
    4: [(2, 1, 2), (1, 2, 2), (2, 2, 1)],
    8: [(2, 2, 2)],  # by hand: torchrun --nproc-per-node 8 tests/parallel/layouts_worker.py FOLDER
}
SEGMENTS = [{"name": "base", "qkv": 12, "output": 10, "ffn": 21}, {"name": "grown1", "qkv": 5, "output": 6, "ffn": 7}]
GROWN = {"qkv": 24, "output": 19, "ffn": 33}
IDS = tiny_ids(8, 9)


def whole_model() -> TokenFormerForCausalLM:
    torch.manual_seed(0)
    return tiny_model(segments=SEGMENTS).double()


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    # Not the model's own, which is computed in float32.
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: full(tensor) for name, tensor in saved_tensors(model).items()}


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups_by_mesh({"params": list(model.named_parameters())}), lr=1e-2)


def check(layout: Layout, folder: Path) -> dict[str, float | bool]:
    ranks = Ranks(layout, torch.device("cpu"))
    found: dict[str, float | bool] = {}
    whole, cut = whole_model().train(), shard_model(whole_model().train(), ranks)
    if layout.tensor > 1:
        cut.activation_checkpointing_enable()
        keys = [p for name, p in cut.named_parameters() if name.endswith(".key")]
        found["tokens are cut"] = all(p.to_local().shape[0] < p.shape[0] for p in keys)

    # Losses and gradients, over two passes that are accumulated.
    size = len(IDS) // 2 // layout.batch_parts
    losses = []
    for half in IDS.chunk(2):
        one = loss_of(whole, half)
        (one / 2).backward()
        mine = loss_of(cut, half[ranks.batch_part * size : (ranks.batch_part + 1) * size])
        (mine / 2).backward()
        losses.append(abs(ranks.mean(mine).item() - one.item()))
    found["loss"] = max(losses)
    expected = {name: p.grad for name, p in whole.named_parameters()}
    errors = [(full(p.grad) - expected[name]).abs().max() for name, p in cut.named_parameters()]
    found["gradients"] = torch.stack(errors).max().item()
    norm = clip_gradients(cut, 0.1, ranks).double().item()
    one_norm = nn.utils.clip_grad_norm_(whole.parameters(), 0.1).item()
    found["norm"] = abs(norm / one_norm - 1)
    found["clipped"] = max((full(p.grad) - expected[name]).abs().max().item() for name, p in cut.named_parameters())

    # Before a forward pass without a backward one: FSDP2 then leaves the embeddings gathered.
    optimizer = adamw(cut)

    # The row statistic of every normalisation is that over all processes.
    for kind in ("gelu_l2", "gelu_l1", "softmax"):
        for model in (whole, cut):
            for layer in model.modules():
                if isinstance(layer, Pattention):
                    layer.normalization = kind
        found[kind] = abs(loss_of(cut, IDS).item() - loss_of(whole, IDS).item())
    for layer in cut.modules():
        if isinstance(layer, Pattention):
            layer.normalization = "l2_gelu"

    # A checkpoint, read by the same layout into another model; the exact state of the optimizer too.
    optimizer.step()
    stepped = gathered(cut)
    name = f"{layout.data}{layout.shard}{layout.tensor}"
    save_shards(folder / f"checkpoint-{name}", cut, optimizer)
    again = shard_model(whole_model(), ranks)
    load_shards(folder / f"checkpoint-{name}", again)
    found["checkpoint"] = same(gathered(again), stepped)
    restored = adamw(again)
    load_optimizer_shards(folder / f"checkpoint-{name}", restored)
    found["optimizer"] = all(
        torch.equal(full(optimizer.state[a][key]), full(restored.state[b][key]))
        for (_, a), (_, b) in zip(named_parameters_of(optimizer), named_parameters_of(restored), strict=True)
        for key in ("exp_avg", "exp_avg_sq", "step")
    )

    # An ordinary folder, in several files, and a model in parts from it.
    written = folder / f"model-{name}"
    if ranks.main:
        written.mkdir()
    ranks.barrier()
    write_model(cut, written, ranks, largest_file="20KB")
    ranks.barrier()
    found["folder"] = same(gathered(TokenFormerForCausalLM.from_pretrained(written, dtype=torch.float64)), stepped)
    config = TokenFormerConfig.from_pretrained(written)
    opened = lay_out(*stored_model(TokenFormerForCausalLM, config, written), ranks)
    found["opened"] = same(gathered(opened), stepped)
    found["opened computes"] = (loss_of(opened, IDS) - loss_of(cut, IDS)).abs().item()

    # A new model has the values that one process draws, and leaves the generator where it would be.
    torch.manual_seed(7)
    fresh, after = TokenFormerForCausalLM(cut.config), torch.rand(3)
    torch.manual_seed(7)
    model, fill = new_model(TokenFormerForCausalLM, cut.config)
    found["new"] = same(gathered(lay_out(model, fill, ranks)), gathered(fresh)) and torch.equal(torch.rand(3), after)

    # Growing: as the gathered model grows, and the function stays.
    reference = whole_model()
    reference.load_state_dict(stepped, strict=False)
    before = loss_of(cut.eval(), IDS).item()
    torch.manual_seed(3)
    grow(reference, **GROWN)
    torch.manual_seed(3)
    grown = grow_in_parts(cut, ranks, **GROWN)
    found["growing"] = same(gathered(grown), gathered(reference)) and grown.config.segments == reference.config.segments
    found["growing keeps"] = abs(loss_of(grown, IDS).item() - before)
    grown.zero_grad()  # where it was grown in place, those of before are there still
    loss_of(grown, IDS).backward()
    loss_of(reference, IDS).backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    found["grown gradients"] = max(
        (full(p.grad) - expected[name]).abs().max().item() for name, p in grown.named_parameters()
    )
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    import torch.distributed as dist

    dist.init_process_group("gloo")
    results = {}
    for sizes in LAYOUTS[dist.get_world_size()]:
        results[str(Layout(*sizes))] = check(Layout(*sizes), folder)
    # Every process must have found the same: the test reads one file for each.
    (folder / f"rank-{dist.get_rank()}-of-{dist.get_world_size()}.json").write_text(json.dumps(results))
    if dist.get_world_size() == 2:  # what four processes wrote
        ranks = Ranks(Layout(1, 1, 2), torch.device("cpu"))
        for name in ("212", "122", "221"):
            model = shard_model(whole_model(), ranks)
            load_shards(folder / f"checkpoint-{name}", model)
            expected = TokenFormerForCausalLM.from_pretrained(folder / f"model-{name}", dtype=torch.float64)
            assert same(gathered(model), gathered(expected))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

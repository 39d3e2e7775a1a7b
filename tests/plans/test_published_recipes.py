"""The plans of the published runs: sizes, budgets and settings are those of the paper's tables."""

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenformer.cli.run import parse
from tokenformer.plans.dry_run import dry_run
from tokenformer.plans.plan import Plan

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "growth"
VOCABULARY = 50304

# (layers, channels, tokens of query, key, value and output, tokens of the ffn) by the paper's name of the size
PILE = {
    "150M": (12, 768, 768, 3072),
    "450M": (24, 1024, 1024, 4096),
    "900M": (32, 1280, 1280, 5120),
    "1.5B": (40, 1536, 1536, 6144),
}
FAMILY = {
    "124M": (12, 768, 576, 2304),
    "354M": (12, 768, 2140, 8560),
    "757M": (12, 768, 4850, 19400),
    "1.4B": (12, 768, 8620, 34480),
}
RELEASED = {"354M": (24, 1024, 768, 3072), "757M": (24, 1024, 1792, 7168)}
# The paper's names count a tied embedding once, to 1.5 %, but for the two largest: 1.4B has 1.31 B parameters, and 1.5B
# has 1.59 B (1.51 B without the embedding).
LARGEST = {"1.4B": 0.065, "1.5B": 0.06}
STEP = 512 * 1024


def _parameters(layers: int, width: int, tokens: int, ffn: int) -> int:
    """Parameters without embeddings, as in PAPER: 2 L d (n_q + n_k + n_v + n_o + n_ffn), and the final norm."""
    return 2 * layers * width * (4 * tokens + ffn) + 2 * width


def _number(name: str) -> float:
    return float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]


@cache
def _plan(name: str) -> Plan:
    return parse([str(RECIPES / f"{name}.yaml")])[0]


@cache
def _report(name: str) -> dict[str, Any]:
    return dry_run(_plan(name), gpu="h100")


def _row(recipe: str, stage: str) -> dict[str, Any]:
    row: dict[str, Any] = _report(recipe)["stages"][stage]
    return row


PUBLISHED = ["paper-124M-to-1.4B", "paper-354M-to-757M", "paper-enwik8", "paper-growth-methods", "paper-pile"]


def test_every_published_plan_is_tested_here() -> None:
    assert sorted(path.stem for path in RECIPES.glob("paper-*.yaml")) == PUBLISHED


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_plan_fits_an_accelerator_of_80_gb_and_says_that_its_data_are_assumed(recipe: str) -> None:
    report = _report(recipe)
    assert report["totals"]["memory"] < 80e9
    assert _plan(recipe).data.path in report["assumed"]["missing"]
    assert report["assumed"]["vocab_size"] == VOCABULARY
    assert report["totals"]["runs"] == len(report["stages"])  # one seed, one learning rate: the paper tried no others


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_head_of_the_file_shows_how_to_prepare_and_run(recipe: str) -> None:
    text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
    head = text[: text.index("\ntitle:")]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"tokenformer run recipes/growth/{recipe}.yaml --dry-run" in head
    paths = {_plan(recipe).data.path, *(s.data for s in _plan(recipe).all_stages.values() if s.data)}
    assert all(f"--out {path}" in head for path in paths)


SIZES = [
    *(("paper-pile", name, name, shape) for name, shape in PILE.items()),
    *(("paper-124M-to-1.4B", name, name, shape) for name, shape in FAMILY.items()),
    *(
        ("paper-124M-to-1.4B", f"{name}-{budget}", name, FAMILY[name])
        for name in ("354M", "757M", "1.4B")
        for budget in ("15B", "60B")
    ),
    ("paper-354M-to-757M", "354M", "354M", RELEASED["354M"]),
    ("paper-354M-to-757M", "757M-60k", "757M", RELEASED["757M"]),
    ("paper-354M-to-757M", "757M-120k", "757M", RELEASED["757M"]),
    *(("paper-growth-methods", name, name, FAMILY[name]) for name in ("124M", "354M", "757M")),
    *(("paper-enwik8", name, name, FAMILY[name]) for name in ("354M", "757M")),
]


@pytest.mark.parametrize(
    ("recipe", "stage", "size", "shape"), SIZES, ids=[f"{recipe}:{stage}" for recipe, stage, *_ in SIZES]
)
def test_parameters_are_those_of_the_table(
    recipe: str, stage: str, size: str, shape: tuple[int, int, int, int]
) -> None:
    row = _row(recipe, stage)
    assert row["family"] == "tokenformer"
    assert row["non_embedding_parameters"] == _parameters(*shape)
    assert row["parameters"] == _parameters(*shape) + VOCABULARY * shape[1]
    assert row["parameters"] == pytest.approx(_number(size), rel=LARGEST.get(size, 0.015))
    layers, width = shape[:2]
    products = row["parameters"] - 2 * width  # the final norm multiplies no matrix
    assert row["flops_per_token"] == 3 * (2 * products + 4 * layers * width * row["sequence_length"])


TRANSFORMERS = [
    *(
        ("paper-124M-to-1.4B", f"transformer-{size}-{budget}", size)
        for size, budget in (("124M", "300B"), ("354M", "300B"), ("757M", "300B"), ("1.4B", "300B"))
    ),
    *(("paper-124M-to-1.4B", f"transformer-{size}-30B", size) for size in ("354M", "757M", "1.4B")),
    *(("paper-354M-to-757M", f"transformer-{steps}", "757M-120k") for steps in ("60k", "120k", "600k")),
    ("paper-growth-methods", "transformer-124M", "124M"),
    *(
        ("paper-growth-methods", f"{method}-{size}", size)
        for method in ("net2net", "hypercloning")
        for size in ("354M", "757M")
    ),
    ("paper-enwik8", "transformer-354M", "354M"),
    ("paper-enwik8", "net2net-757M", "757M"),
]


@pytest.mark.parametrize(("recipe", "stage", "like"), TRANSFORMERS, ids=[f"{r}:{s}" for r, s, _ in TRANSFORMERS])
def test_transformer_has_as_many_parameters_as_the_tokenformer(recipe: str, stage: str, like: str) -> None:
    row = _row(recipe, stage)
    assert row["family"] == "gpt_neox"
    assert row["baseline"]
    wanted = _row(recipe, like)["non_embedding_parameters"]
    assert row["non_embedding_parameters"] == pytest.approx(wanted, rel=0.02)


def test_every_stage_of_a_published_plan_has_its_size_tested() -> None:
    tested = {(recipe, stage) for recipe, stage, *_ in [*SIZES, *TRANSFORMERS]}
    assert tested == {(recipe, stage) for recipe in PUBLISHED for stage in _report(recipe)["stages"]}


def test_pile_models_see_300_billion_tokens_in_143000_steps() -> None:
    for name in PILE:
        row = _row("paper-pile", name)
        assert (row["steps"], row["tokens"]) == (143_000, 143_000 * 1024 * 2048)
        assert row["tokens"] == pytest.approx(300e9, rel=0.001)
        assert row["cumulative_tokens"] == row["tokens"]


# billions of tokens of a stage, and of all that lead to it (Tables 6 and 7)
BUDGETS = {
    "paper-124M-to-1.4B": {
        "124M": (60, 60),
        **{size: (30, 60 + 30 * grown) for grown, size in enumerate(("354M", "757M", "1.4B"), 1)},
        **{f"{size}-15B": (15, 60 + 15 * grown) for grown, size in enumerate(("354M", "757M", "1.4B"), 1)},
        **{f"{size}-60B": (60, 60 + 60 * grown) for grown, size in enumerate(("354M", "757M", "1.4B"), 1)},
        **{f"transformer-{size}-300B": (300, 300) for size in FAMILY},
        **{f"transformer-{size}-30B": (30, 30) for size in ("354M", "757M", "1.4B")},
    },
    "paper-growth-methods": {
        "124M": (60, 60),
        "transformer-124M": (60, 60),
        **{f"{method}354M": (30, 90) for method in ("", "net2net-", "hypercloning-")},
        **{f"{method}757M": (30, 120) for method in ("", "net2net-", "hypercloning-")},
    },
}


@pytest.mark.parametrize("recipe", BUDGETS)
def test_openwebtext_budgets_are_those_of_the_table_in_whole_steps(recipe: str) -> None:
    stages = _report(recipe)["stages"]
    assert stages.keys() == BUDGETS[recipe].keys()
    for name, row in stages.items():
        own, all_stages = BUDGETS[recipe][name]
        assert 0 <= row["tokens"] - own * 1e9 < STEP, name
        assert 0 <= row["cumulative_tokens"] - all_stages * 1e9 < len(row["chain"]) * STEP, name
        assert row["tokens"] == row["steps"] * STEP


@pytest.mark.parametrize("recipe", BUDGETS)
def test_openwebtext_stages_warm_up_for_2000_steps_and_end_at_zero(recipe: str) -> None:
    plan, stages = _plan(recipe), _report(recipe)["stages"]
    for name, stage in plan.all_stages.items():
        recipe_of_stage = {**asdict(plan.optimizer), **stage.optimizer}
        # Within half a step, so that the share is these steps however it is rounded.
        assert abs(recipe_of_stage["warmup"] * stages[name]["steps"] - 2000) < 0.5, name
        assert stages[name]["warmup_steps"] == 2000
        assert recipe_of_stage["min_ratio"] == 0
        assert (recipe_of_stage["schedule"], stage.schedule) == ("cosine", "restart")
        assert (stage.learning_rates, plan.training.batch_size) == ([6e-4], 512)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_growing_is_that_of_the_released_code(recipe: str) -> None:
    plan = _plan(recipe)
    for stage in plan.all_stages.values():
        grow = stage.grow
        if grow is not None and plan.family(stage.name) == "tokenformer":
            found = (grow.keys, grow.scale, grow.noise or 0, grow.old_tokens, grow.optimizer)
            assert found == ("random", "sqrt", 0, 1, "fresh"), stage.name


def test_headline_costs_a_tenth_a_stage() -> None:
    """The paper: 1/10 of each stage's cost. Its third of the cumulative cost is less than a fifth in FLOPs."""
    grown, scratch = _row("paper-124M-to-1.4B", "1.4B"), _row("paper-124M-to-1.4B", "transformer-1.4B-300B")
    assert grown["chain"] == ["124M", "354M", "757M", "1.4B"]
    assert grown["tokens"] / scratch["tokens"] == pytest.approx(0.1, rel=1e-4)
    assert grown["flops"] / scratch["flops"] == pytest.approx(0.1, rel=0.15)
    assert grown["cumulative_flops"] / scratch["cumulative_flops"] < 1 / 3


def test_released_run_has_its_steps() -> None:
    steps = {name: row["steps"] for name, row in _report("paper-354M-to-757M")["stages"].items()}
    assert steps == {
        "354M": 600_000,
        "757M-120k": 120_000,
        "757M-60k": 60_000,
        "transformer-60k": 60_000,
        "transformer-120k": 120_000,
        "transformer-600k": 600_000,
    }
    assert _row("paper-354M-to-757M", "757M-60k")["chain"] == ["354M", "757M-60k"]


def test_enwik8_is_learned_at_a_constant_rate_by_both() -> None:
    plan = _plan("paper-enwik8")
    for name in ("757M", "net2net-757M"):
        stage = plan.all_stages[name]
        assert (stage.data, stage.schedule, stage.learning_rates) == ("data/enwik8", "constant", [6e-4])
        assert _row("paper-enwik8", name)["warmup_steps"] == 0
    assert _row("paper-enwik8", "757M")["tokens"] == _row("paper-enwik8", "net2net-757M")["tokens"]


@pytest.mark.parametrize("size", PILE)
def test_recipe_for_train_is_the_same_run_as_the_plan(size: str) -> None:
    plan = _plan("paper-pile")
    stage = plan.all_stages[size]
    recipe = yaml.safe_load((ROOT / "recipes" / "language" / f"pile-{size}.yaml").read_text(encoding="utf-8"))
    assert recipe["model"] == {"preset": size}
    assert stage.train is not None
    assert stage.train.preset == size
    training = {**asdict(plan.training), **stage.training, "tokens": stage.tokens}
    assert recipe["training"] == {name: training[name] for name in recipe["training"]}
    optimizer = {**asdict(plan.optimizer), "learning_rate": stage.learning_rates[0]}
    assert recipe["optimizer"] == {name: optimizer[name] for name in recipe["optimizer"]}


def test_recipe_for_train_of_124M_is_the_first_stage_of_the_family() -> None:
    plan = _plan("paper-124M-to-1.4B")
    stage = plan.all_stages["124M"]
    recipe = yaml.safe_load((ROOT / "recipes" / "language" / "openwebtext-124M.yaml").read_text(encoding="utf-8"))
    training = {**asdict(plan.training), "tokens": stage.tokens}
    assert recipe["training"] == {name: training[name] for name in recipe["training"]}
    optimizer = {**asdict(plan.optimizer), **stage.optimizer, "learning_rate": stage.learning_rates[0]}
    assert recipe["optimizer"] == {name: optimizer[name] for name in recipe["optimizer"]}

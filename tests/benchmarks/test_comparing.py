"""Records side by side: verdicts by hand, what is refused, and the command."""

import copy
import json

import pytest

from tokenformer import UserError
from tokenformer.benchmarks import comparing
from tokenformer.benchmarks.timing import Timing
from tokenformer.cli import main


def figures(*seconds):
    return Timing(seconds).as_dict()


@pytest.fixture
def old():
    """A record of two cases in one dtype; their quartiles are 9.5 and 10.5, 4 and 4."""
    return {
        "benchmark": "forward",
        "options": {"length": 8, "dtypes": ["float32", "bfloat16"], "repeats": 3},
        "threads": 2,
        "hardware": {"cpu": "A", "cores": 2, "flags": ["avx2"]},
        "versions": {"torch": "2.13.0"},
        "models": {"tokenformer": {"layers": 2, "hidden_size": 32, "vocabulary": 31, "parameters": 100}},
        "seconds": {"float32": {"prefill": {"wide": figures(9.0, 10.0, 11.0), "narrow": figures(4.0, 4.0, 4.0)}}},
        "peak_memory": {"float32": {"wide": {"total": 1000, "held": 400, "step": 600}}},
    }


@pytest.fixture
def new(old):
    return copy.deepcopy(old)


def verdicts(old, new, **options):
    found = comparing.compare(old, new, **options)
    return {(row.direction, row.case): row.verdict for row in found.rows}


def test_equal_records_are_the_same(old, new):
    assert set(verdicts(old, new).values()) == {"same"}
    assert comparing.compare(old, new).changed == []


@pytest.mark.parametrize(
    ("rounds", "verdict"),
    [
        ((11.0, 11.0, 11.0), "slower"),  # by 10 %, and above the third quartile of 10.5
        ((10.4, 11.0, 11.6), "slower"),  # first quartile 10.7
        ((9.8, 11.0, 12.0), "same"),  # as much, but its first quartile is 10.4
        ((10.4, 10.4, 10.4), "same"),  # by 4 %
        ((9.0, 9.0, 9.0), "faster"),
        ((8.0, 9.0, 11.0), "same"),  # third quartile 10
    ],
)
def test_a_change_is_beyond_the_threshold_and_beyond_the_quartiles(old, new, rounds, verdict):
    new["seconds"]["float32"]["prefill"]["wide"] = figures(*rounds)
    assert verdicts(old, new)["prefill", "wide"] == verdict
    assert verdicts(old, new)["prefill", "narrow"] == "same"


def test_the_threshold_is_given(old, new):
    new["seconds"]["float32"]["prefill"]["narrow"] = figures(4.2, 4.2, 4.2)
    assert verdicts(old, new)["prefill", "narrow"] == "same"
    assert verdicts(old, new, threshold=0.04)["prefill", "narrow"] == "slower"


def test_memory_is_compared(old, new):
    new["peak_memory"]["float32"]["wide"]["total"] = 1200
    assert verdicts(old, new)["peak memory", "wide"] == "more"
    new["peak_memory"]["float32"]["wide"]["total"] = 800
    assert verdicts(old, new)["peak memory", "wide"] == "less"


def test_the_worst_comes_first(old, new):
    new["seconds"]["float32"]["prefill"] = {"wide": figures(20.0, 20.0, 20.0), "narrow": figures(12.0, 12.0, 12.0)}
    new["peak_memory"]["float32"]["wide"]["total"] = 500
    assert [row.ratio for row in comparing.compare(old, new).changed] == [3.0, 2.0, 0.5]


def test_cases_of_one_record_alone_are_named(old, new):
    cases = new["seconds"]["float32"]["prefill"]
    cases["added"] = cases.pop("narrow")
    found = comparing.compare(old, new)
    assert found.missing == {"old": ["float32, prefill, added"], "new": ["float32, prefill, narrow"]}


def test_images_are_compared_by_their_rates(old, new):
    for record, rates, first in ((old, [100.0, 50.0, 50.0], 100.0), (new, [100.0, 25.0, 25.0], 100.0)):
        record["benchmark"] = "images"
        record["loader"] = {"0": {"first_pass": first, "later_passes": rates[1], "images_per_second": rates}}
        record["model"] = {"precision": "fp32", "seconds": {"step": figures(1.0, 1.0)}}
    found = {(row.direction, row.case): row for row in comparing.compare(old, new).rows}
    later = found["later passes", "0_workers"]
    assert (later.old, later.new, later.verdict) == (0.02, 0.04, "slower")
    assert found["first pass", "0_workers"].verdict == found["step", "step"].verdict == "same"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"benchmark": "decode"}, "the old record is of 'forward', not of 'decode'"),
        ({"options": {"length": 9}}, "the old record has length 8, this one 9"),
        ({"options": {"dtypes": ["float32"]}}, "has dtypes float32, bfloat16, this one float32: figures of different"),
        ({"models": {"tokenformer": {"layers": 3}}}, "a tokenformer of layers 2, this one 3"),
        ({"models": {"tokenformer": {"parameters": 101}}}, "of parameters 100, this one 101"),
    ],
    ids=str,
)
def test_records_of_different_things_are_refused(old, new, change, words):
    for name, value in change.items():
        if name == "models":
            new["models"]["tokenformer"] |= value["tokenformer"]
        else:
            new[name] = {**new[name], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=words):
        comparing.compare(old, new)


def test_rounds_and_the_order_of_dtypes_may_differ(old, new):
    new["options"] |= {"repeats": 9, "dtypes": ["bfloat16", "float32"]}
    assert len(comparing.compare(old, new).rows) == 3


def test_other_conditions_are_warned_of(old, new):
    assert comparing.compare(old, new).warnings == []
    new["hardware"]["cpu"], new["threads"], new["versions"]["torch"] = "B", 4, "2.14.0"
    assert comparing.compare(old, new).warnings == [
        "processors differ: A then, B now",
        "threads differ: 2 then, 4 now",
        "torch versions differ: 2.13.0 then, 2.14.0 now",
    ]


def test_negative_threshold_is_refused(old, new):
    with pytest.raises(UserError, match="threshold must not be negative"):
        comparing.compare(old, new, threshold=-0.1)


# On the command line


@pytest.fixture
def files(tmp_path, old, new):
    new["seconds"]["float32"]["prefill"]["wide"] = figures(20.0, 20.0, 20.0)
    paths = tmp_path / "old.json", tmp_path / "new.json"
    for path, record in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(record), encoding="utf-8")
    return [str(path) for path in paths]


def test_two_records_without_running(capsys, files):
    assert main(["bench", "compare", *files]) == 0
    out = capsys.readouterr().out
    (row,) = (line for line in out.splitlines() if "slower" in line)
    assert row.split() == ["slower", "float32", "prefill", "wide", "10,000.00", "ms", "20,000.00", "ms", "2.000"]
    assert "2 of 3 cases are as before." in out
    assert "warning" not in out


def refused(capsys, *argv):
    assert main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read the record"),
        ("{", "is no JSON"),
        ("[]", "is no record"),
        ('{"benchmark": "forward"}', "is no record"),
    ],
)
def test_files_that_are_no_records(capsys, tmp_path, files, content, words):
    file = tmp_path / "wrong.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    assert words in refused(capsys, "compare", str(file), files[1])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["decode"], "the old record is of 'forward', not of 'decode'"),
        (["forward", "--length", "16", "--quick"], "the old record has length 8, this one 16"),
        (["forward", "--length", "8", "--dtypes", "float32"], "the old record has dtypes float32, bfloat16"),
        (["forward", "--compare", "absent.json"], "cannot read the record 'absent.json'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_another_record_is_refused_before_measuring(capsys, monkeypatch, tmp_path, files, argv, words):
    from tokenformer.benchmarks import decode, forward

    def measure(*args, **options):
        pytest.fail("began to measure")

    monkeypatch.setattr(decode, "measure", measure)
    monkeypatch.setattr(forward, "measure", measure)
    argv = argv if "--compare" in argv else [*argv, "--compare", files[0]]
    assert words in refused(capsys, *argv, "--json", str(tmp_path / "record.json"))
    assert not (tmp_path / "record.json").exists()


def test_pattention_is_compared_by_its_shape(capsys, monkeypatch, tmp_path, old):
    old |= {"benchmark": "pattention", "options": {"tokens": 2048, "dtypes": ["float32", "bfloat16"]}}
    file = tmp_path / "old.json"
    file.write_text(json.dumps(old), encoding="utf-8")
    from tokenformer.benchmarks import pattention

    monkeypatch.setattr(pattention, "measure", lambda *args, **options: pytest.fail("began to measure"))
    assert "has tokens 2048, this one 256" in refused(capsys, "pattention", "--quick", "--compare", str(file))


def test_a_run_is_compared_with_an_old_record(capsys, monkeypatch, tmp_path, files, new):
    from tokenformer.benchmarks import forward, showing

    new["seconds"]["float32"]["prefill"]["wide"] = figures(5.0, 5.0, 5.0)
    monkeypatch.setattr(forward, "measure", lambda config, **options: new)
    monkeypatch.setattr(showing, "show_models", lambda record, console: console.print("figures"))
    argv = ["forward", "--length", "8", "--compare", files[0], "--json", str(tmp_path / "record.json")]
    assert main(["bench", *argv]) == 0
    out = capsys.readouterr().out
    assert out.index("figures") < out.index("faster") < out.index("record: ")
    assert json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["options"]["length"] == 8


def test_the_comparison_goes_beside_a_record_on_standard_output(capsys, monkeypatch, files, new):
    from tokenformer.benchmarks import forward

    monkeypatch.setattr(forward, "measure", lambda config, **options: new)
    assert main(["bench", "forward", "--length", "8", "--compare", files[0], "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == new
    assert "2 of 3 cases are as before." in err

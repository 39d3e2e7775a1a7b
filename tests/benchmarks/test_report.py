"""The record of a benchmark and where it is written."""

import json

import pytest
import torch

from tokenformer import UserError, __version__
from tokenformer.benchmarks import report


@pytest.fixture
def record():
    return report.new_record("pattention", {"tokens": 4}, threads=2)


def test_record_says_on_what(record):
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["tokenformer"] == __version__
    assert record["hardware"]["cpu"]
    assert record["hardware"]["cores"] >= 1
    assert (record["threads"], record["options"]) == (2, {"tokens": 4})


@pytest.mark.parametrize(
    ("cpu", "flags", "slug"),
    [
        ("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", ["amx_bf16"], "intel-xeon-platinum-8488c-amx-2t"),
        ("AMD EPYC 7R13 Processor", ["avx2"], "amd-epyc-7r13-2t"),
        ("???", [], "cpu-2t"),
    ],
)
def test_file_name(record, cpu, flags, slug):
    record["hardware"] |= {"cpu": cpu, "flags": flags}
    record["versions"]["torch"] = "2.13.0+cpu"
    record["date"] = "2030-01-02T03:04:05+00:00"
    assert report.file_name(record) == f"pattention_{slug}_2.13.0_2030-01-02.json"


def test_written_to_a_file_or_under_its_name_into_a_folder(record, tmp_path):
    file = report.write(record, str(tmp_path / "mine.json"))
    assert file == tmp_path / "mine.json"
    assert json.loads(file.read_text(encoding="utf-8")) == record
    assert report.write(record, str(tmp_path)) == tmp_path / report.file_name(record)


def test_written_to_standard_output(record, capsys):
    assert report.write(record, "-") is None
    assert json.loads(capsys.readouterr().out) == record


def test_missing_folder_is_refused_before_measuring(tmp_path):
    for target in (tmp_path / "absent" / "file.json", f"{tmp_path}/absent/"):
        with pytest.raises(UserError, match="create it first"):
            report.check_target(str(target))
    report.check_target("-")
    report.check_target(str(tmp_path))
    report.check_target("file.json")

"""The README tells the truth: its code runs, its tables are what is generated, it names every op and variable there is."""

import re
from pathlib import Path

import pytest

import step_kernels as sk
from bench.evidence.readme import REGION, regenerated
from bench.evidence.results import READERS
from bench.table import result_of

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
REGIONS = [(kind, path) for kind, path, _ in REGION.findall(README)]
TABLES = [path for kind, path in REGIONS if kind == "table"]
COMMITTED = [path for path in (ROOT / "bench" / "results").rglob("*.json") if "latest" not in path.parts]


@pytest.mark.parametrize("code", CODE, ids=range(len(CODE)))
def test_code_runs_as_written(code, capsys):
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def test_there_is_code_a_table_and_a_report():
    assert len(CODE) == 2 and TABLES and [path for kind, path in REGIONS if kind == "report"]
    assert README.count("<!-- end of ") == len(REGIONS)


def test_tables_are_what_report_generates_from_committed_results():
    assert regenerated(README, ROOT) == README, "run `python -m bench report --readme README.md`"


@pytest.mark.parametrize("path", TABLES)
def test_published_results_come_from_a_commit_and_passed_their_gate(path):
    result = result_of((ROOT / path).read_text(encoding="utf-8"))
    assert result.environment["commit"] and not result.environment["dirty"]
    assert "FAILED" not in {row.gate for row in result.rows}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_results_name_no_path_and_can_be_read(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(/home|/root|/tmp|/Users|[A-Z]:\\\\)", text)
    if path.name in READERS:
        assert result_of(text).rows


def test_the_readme_says_that_no_gpu_was_measured_as_long_as_none_was():
    measured = [
        path for path in COMMITTED if path.name in READERS and result_of(path.read_text("utf-8")).environment["gpu"]
    ]
    assert ("GPU figures are not measured yet" in README) == (not measured)


def test_every_public_name_is_in_the_readme():
    internal = {"Halting", "UnusedAcceleratorWarning"}  # what ops return and warn with
    assert [name for name in sk.__all__ if name not in internal and f"`{name}`" not in README] == []


def test_the_op_table_names_only_what_exists():
    section = README.split("## Operations")[1].split("## Platforms")[0]
    assert {name for name in re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)} <= set(sk.__all__)


def test_environment_variables_are_those_the_code_reads():
    sources = [*(ROOT / "step_kernels").rglob("*.py"), *(ROOT / "model").rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    read = {
        name
        for source in sources
        for name in re.findall(r"environ(?:\.get)?[\[(]\"(\w+)\"", source.read_text(encoding="utf-8"))
    }
    section = README.split("## Environment variables")[1].split("## Limits")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == read


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

"""The README tells the truth: its code runs, its tables are what is generated, it names every op and variable there is."""

import re
from pathlib import Path

import pytest

import step_kernels as sk
from bench.report import markdown_table
from bench.schema import Result

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TABLES = re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- end of table -->", README, re.DOTALL)


@pytest.mark.parametrize("code", CODE, ids=range(len(CODE)))
def test_code_runs_as_written(code, capsys):
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def test_there_is_code_and_a_table():
    assert len(CODE) == 2 and TABLES


@pytest.mark.parametrize(("path", "text"), TABLES)
def test_tables_are_generated_from_committed_results(path, text):
    assert text.strip() == markdown_table(Result.read(ROOT / path)).strip()


@pytest.mark.parametrize(("path", "text"), TABLES)
def test_published_results_come_from_a_commit_and_passed_their_gate(path, text):
    result = Result.read(ROOT / path)
    assert result.environment["commit"] and not result.environment["dirty"]
    assert {row.gate for row in result.rows} == {"PASSED"}


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
